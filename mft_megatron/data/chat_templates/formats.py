"""How a conversation is written: formats of our own, and the choice between them and the model's own template.

Every assistant turn and the token that ends it are supervised, nothing else. :data:`FORMATS` names the formats; a new
one is a function, its markers and a line. Templates are in :mod:`~mft_megatron.data.chat_templates.jinja_format`.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mft_megatron.data.records.conversation import Conversation, Turn
from mft_megatron.data.records.segments import SUPERVISE, Segment, raw_segments, refuse_reasoning, supervised_turns
from mft_megatron.data.tokenizers.tokenizer import Tokenizer
from mft_megatron.errors import InputError

from .jinja_format import TemplateFormat, template_format

__all__ = ["FORMATS", "SUPERVISE", "ChatFormat", "Segment", "TemplateFormat", "chat_format"]


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """A format of :data:`FORMATS`. :class:`.jinja_format.TemplateFormat` has the same interface.

    ``markers``: what opens the turn of each role. ``end_of_text``: the tokenizer's. ``supervise``: of
    :data:`~mft_megatron.data.records.segments.SUPERVISE`.
    """

    name: str
    markers: Mapping[str, str]
    end_of_text: str
    supervise: str = "all"

    @property
    def stop_token(self) -> str:
        """The token that ends an assistant's turn."""
        return STOP_TOKENS.get(self.name, self.end_of_text)

    def segments(self, conversation: Conversation) -> list[Segment]:
        """The whole sample in order.

        Raises:
            RecordError: nothing in it is supervised, or a turn says something that this format has no place for.
        """
        if conversation.raw:
            return raw_segments(conversation, self.end_of_text)
        refuse_reasoning(
            conversation,
            f"which --chat-template {self.name} has no place for; use the model's own template, or move it into the "
            "content",
        )
        supervised = supervised_turns(conversation, self.supervise)
        turns = conversation.turns
        if conversation.tools:
            turns = _with_tools(turns, conversation.tools)
            supervised = [False] * (len(turns) - len(supervised)) + supervised
        return FORMATS[self.name](self, turns, supervised)

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides how a conversation is written."""
        content = json.dumps([self.name, dict(self.markers), self.end_of_text, self.supervise], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    # what is the same in every conversation, made once
    @functools.cached_property
    def _openings(self) -> dict[str, tuple[Segment, ...]]:
        return {role: _opening(self.name, marker) for role, marker in self.markers.items()}

    @functools.cached_property
    def _stops(self) -> tuple[Segment, Segment]:
        """The stop token, unsupervised and supervised."""
        return Segment(self.stop_token, False, True), Segment(self.stop_token, True, True)


def _opening(name: str, marker: str) -> tuple[Segment, ...]:
    if name == "chatml":
        return Segment("<|im_start|>", False, True), Segment(f"{marker}\n", False)
    # a marker's <s>, where it begins with one, is one token where the vocabulary has it
    if marker.startswith("<s>"):
        rest = marker[len("<s>") :]
        return (Segment("<s>", False, True), Segment(rest, False)) if rest else (Segment("<s>", False, True),)
    return (Segment(marker, False),) if marker else ()


_NEWLINE = Segment("\n", False)


def _chatml(style: ChatFormat, turns: tuple[Turn, ...], supervised: list[bool]) -> list[Segment]:
    """``<|im_start|>role\\ncontent<|im_end|>\\n``; answers of tools between ``<tool_response>`` tags, and in one turn
    where one follows the other. Qwen2.5 has them in a turn of the user: ``--role-markers '{"tool": "user"}'``."""
    openings, stops = style._openings, style._stops
    written: list[Segment] = []
    role_before = None
    for turn, learn in zip(turns, supervised, strict=True):
        role = turn.role
        if role == role_before == "tool":
            written[-2:] = (_NEWLINE,)
        else:
            written += openings[role]
        if role == "tool":
            written += _tag("tool_response", turn.content, False)
        elif turn.tool_calls:
            written += _calls(turn, learn)
        else:
            written.append(Segment(turn.content, learn))
        written += (stops[learn], _NEWLINE)
        role_before = role
    return written


def _mftcoder(style: ChatFormat, turns: tuple[Turn, ...], supervised: list[bool]) -> list[Segment]:
    """``<s>system\\n…\\n<s>human\\n…\\n<s>bot\\n…`` and the end-of-text token after each answer."""
    openings, stops = style._openings, style._stops
    written: list[Segment] = []
    for turn, learn in zip(turns, supervised, strict=True):
        written += openings[turn.role]
        if turn.role != "assistant":
            written.append(Segment(f"{turn.content}\n", False))
        else:
            written += _calls(turn, learn) if turn.tool_calls else (Segment(turn.content, learn),)
            written += (stops[learn], _NEWLINE)
    return written


def _calls(turn: Turn, learn: bool) -> list[Segment]:
    """An assistant's content, then its calls, as Qwen2.5 and Hermes write them."""
    written = [Segment(turn.content, learn)] if turn.content else []
    for call in turn.tool_calls:
        if written:
            written.append(Segment("\n", learn))
        name, arguments = _json(call["name"]), _json(call["arguments"])
        written += _tag("tool_call", f'{{"name": {name}, "arguments": {arguments}}}', learn)
    return written


def _tag(name: str, content: str, learn: bool) -> tuple[Segment, ...]:
    """The tags are one token each in the vocabularies that have them, else text."""
    return Segment(f"<{name}>", learn, True), Segment(f"\n{content}\n", learn), Segment(f"</{name}>", learn, True)


def _with_tools(turns: tuple[Turn, ...], tools: tuple[Mapping[str, Any], ...]) -> tuple[Turn, ...]:
    """The turns, with the tools listed at the end of the system turn, which is put in front where there is none."""
    listed = _TOOLS.format(tools="\n".join(map(_json, tools)))
    if turns[0].role == "system":
        return dataclasses.replace(turns[0], content=f"{turns[0].content}\n\n{listed}"), *turns[1:]
    return Turn("system", listed), *turns


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# what models of the Qwen2.5 and Hermes kind were trained to find in their system turn
_TOOLS = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""

FORMATS: dict[str, Callable[[ChatFormat, tuple[Turn, ...], list[bool]], list[Segment]]] = {
    "chatml": _chatml,
    "mftcoder": _mftcoder,
}
STOP_TOKENS = {"chatml": "<|im_end|>"}  # where it is not the end-of-text token
MARKERS = {
    "chatml": {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"},
    "mftcoder": {"system": "<s>system\n", "user": "<s>human\n", "assistant": "<s>bot\n", "tool": "<s>tool\n"},
}


def chat_format(
    name: str, tokenizer: Tokenizer, role_markers: str | None = None, supervise: str = "all"
) -> ChatFormat | TemplateFormat:
    """The format of ``--chat-template`` with the markers of ``--role-markers``.

    Args:
        name: a key of :data:`FORMATS`; a path of a ``.jinja`` file; or "auto": the tokenizer's own template where it
            has one, else chatml where it has the tokens for it, else mftcoder. The ``name`` of what is returned says
            which it is.
        tokenizer: of the data set.
        role_markers: JSON object of markers by role; the roles may be called user and assistant, or as in MFTCoder
            human and bot. Roles not named keep the format's marker. Templates have no markers.
        supervise: of :data:`~mft_megatron.data.records.segments.SUPERVISE`.

    Raises:
        InputError: an unknown name, a template that cannot be used, markers that are no JSON object of strings, or an
            unknown role.
    """
    if supervise not in SUPERVISE:
        raise InputError(f"--supervise {supervise}: give one of {', '.join(SUPERVISE)}")
    if name == "auto":
        name = _automatic(tokenizer)
    if name not in FORMATS:
        if role_markers is not None:
            raise InputError("--role-markers: a Jinja template has no role markers; leave them out, or use mftcoder")
        return template_format(_template(name, tokenizer), name.rsplit("/", 1)[-1], tokenizer, supervise)
    return ChatFormat(name, _markers(name, role_markers), tokenizer.end_of_text, supervise)


_OWN = "template"  # the name of the tokenizer's own


def _automatic(tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template is not None:
        return _OWN
    return "mftcoder" if tokenizer.token_id(STOP_TOKENS["chatml"]) is None else "chatml"


def _template(name: str, tokenizer: Tokenizer) -> str:
    if name == _OWN and tokenizer.chat_template is not None:
        return tokenizer.chat_template
    if not name.endswith(".jinja"):
        raise InputError(f"--chat-template {name}: give auto, {', '.join(FORMATS)} or the path of a .jinja file")
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--chat-template {name}: {error.strerror}; give the path of a .jinja file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--chat-template {name}: not UTF-8 (byte {error.start})") from None


def _markers(name: str, role_markers: str | None) -> dict[str, str]:
    markers = dict(MARKERS[name])
    if role_markers is None:
        return markers
    try:
        given = json.loads(role_markers)
    except ValueError as error:
        raise InputError(f"--role-markers {role_markers}: not JSON ({error})") from None
    if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
        raise InputError(f"--role-markers {role_markers}: give a JSON object of strings, one a role")
    for role, text in given.items():
        role = {"human": "user", "bot": "assistant"}.get(role, role)
        if role not in markers:
            raise InputError(f"--role-markers: unknown role {role!r}; known: {', '.join(markers)}, human, bot")
        markers[role] = text
    return markers
