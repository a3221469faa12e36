"""Chat formats, which write a conversation as text: built-in ones, and the choice between them and Jinja templates.

Every assistant turn and the token that ends it are supervised, nothing else. :data:`FORMATS` lists the built-in
formats; a new one is a function, its markers and a line. Templates are in :mod:`.jinja_format`.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from mft_megatron.data.records.conversation import Conversation, Turn
from mft_megatron.data.records.segments import SUPERVISE, Segment, raw_segments, refuse_reasoning, supervised_turns
from mft_megatron.data.tokenizers.tokenizer import Tokenizer
from mft_megatron.errors import InputError

from .jinja_format import template_format


class ChatFormat(Protocol):
    """A way to write conversations: :class:`BuiltInFormat` or :class:`.jinja_format.TemplateFormat`."""

    @property
    def name(self) -> str:
        """Name that messages show."""

    @property
    def stop_token(self) -> str:
        """Name of the token that ends an assistant's turn."""

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that decides how a conversation is written."""

    def segments(self, conversation: Conversation) -> list[Segment]:
        """Write a conversation as segments of the whole sample, in order.

        Raises:
            RecordError: nothing in it is supervised, or a part of it cannot be written.
        """


@dataclasses.dataclass(frozen=True)
class BuiltInFormat:
    """A format of :data:`FORMATS`.

    Attributes:
        name: a key of :data:`FORMATS`.
        markers: text that opens the turn of each role.
        end_of_text: name of the tokenizer's end-of-text token.
        supervise: one of :data:`~mft_megatron.data.records.segments.SUPERVISE`.
    """

    name: str
    markers: Mapping[str, str]
    end_of_text: str
    supervise: str = "all"

    @property
    def stop_token(self) -> str:
        """Name of the token that ends an assistant's turn."""
        return STOP_TOKENS.get(self.name, self.end_of_text)

    def segments(self, conversation: Conversation) -> list[Segment]:
        """Write a conversation as segments of the whole sample, in order.

        Raises:
            RecordError: nothing in it is supervised, or a turn has reasoning, which these formats cannot write.
        """
        if conversation.raw:
            return raw_segments(conversation, self.end_of_text)
        refuse_reasoning(
            conversation,
            f"which --chat-template {self.name} cannot write; use the model's own template, or move it into the "
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
        """sha256 over everything that decides how a conversation is written."""
        content = json.dumps([self.name, dict(self.markers), self.end_of_text, self.supervise], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    # segments that are the same in every conversation
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
    # a <s> at the beginning of a marker is one token if the vocabulary has it
    if marker.startswith("<s>"):
        rest = marker[len("<s>") :]
        return (Segment("<s>", False, True), Segment(rest, False)) if rest else (Segment("<s>", False, True),)
    return (Segment(marker, False),) if marker else ()


_NEWLINE = Segment("\n", False)


def _chatml(style: BuiltInFormat, turns: tuple[Turn, ...], supervised: list[bool]) -> list[Segment]:
    """``<|im_start|>role\\ncontent<|im_end|>\\n``. Answers of tools are between ``<tool_response>`` tags; consecutive
    ones share a turn. Qwen2.5 writes them in a turn of the user: ``--role-markers '{"tool": "user"}'``."""
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


def _mftcoder(style: BuiltInFormat, turns: tuple[Turn, ...], supervised: list[bool]) -> list[Segment]:
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
    """Write an assistant's content and then its calls, as Qwen2.5 and Hermes do."""
    written = [Segment(turn.content, learn)] if turn.content else []
    for call in turn.tool_calls:
        if written:
            written.append(Segment("\n", learn))
        name, arguments = _json(call["name"]), _json(call["arguments"])
        written += _tag("tool_call", f'{{"name": {name}, "arguments": {arguments}}}', learn)
    return written


def _tag(name: str, content: str, learn: bool) -> tuple[Segment, ...]:
    """Write text between two tags; each tag is one token if the vocabulary has it, else text."""
    return Segment(f"<{name}>", learn, True), Segment(f"\n{content}\n", learn), Segment(f"</{name}>", learn, True)


def _with_tools(turns: tuple[Turn, ...], tools: tuple[Mapping[str, object], ...]) -> tuple[Turn, ...]:
    """List the tools at the end of the system turn, which is added if there is none."""
    listed = _TOOLS.format(tools="\n".join(map(_json, tools)))
    if turns[0].role == "system":
        return dataclasses.replace(turns[0], content=f"{turns[0].content}\n\n{listed}"), *turns[1:]
    return Turn("system", listed), *turns


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


# the text in the system turn on which models such as Qwen2.5 and Hermes were trained
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

FORMATS: dict[str, Callable[[BuiltInFormat, tuple[Turn, ...], list[bool]], list[Segment]]] = {
    "chatml": _chatml,
    "mftcoder": _mftcoder,
}
STOP_TOKENS = {"chatml": "<|im_end|>"}  # of formats in which it is not the end-of-text token
MARKERS = {
    "chatml": {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"},
    "mftcoder": {"system": "<s>system\n", "user": "<s>human\n", "assistant": "<s>bot\n", "tool": "<s>tool\n"},
}


def chat_format(name: str, tokenizer: Tokenizer, role_markers: str | None = None, supervise: str = "all") -> ChatFormat:
    """Make the format of ``--chat-template`` with the markers of ``--role-markers``.

    Args:
        name: a key of :data:`FORMATS`; the path of a ``.jinja`` file; or "auto": the tokenizer's template if it has
            one, else chatml if it has the tokens for it, else mftcoder. The result's ``name`` tells which it is.
        tokenizer: of the data set.
        role_markers: JSON object of markers by role; roles are named as here, or human and bot as in MFTCoder. Other
            roles keep the format's marker. Templates have no markers.
        supervise: one of :data:`~mft_megatron.data.records.segments.SUPERVISE`.

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
    return BuiltInFormat(name, _markers(name, role_markers), tokenizer.end_of_text, supervise)


_TOKENIZERS_TEMPLATE = "template"  # name of the template that comes with the tokenizer


def _automatic(tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template is not None:
        return _TOKENIZERS_TEMPLATE
    return "mftcoder" if tokenizer.token_id(STOP_TOKENS["chatml"]) is None else "chatml"


def _template(name: str, tokenizer: Tokenizer) -> str:
    if name == _TOKENIZERS_TEMPLATE and tokenizer.chat_template is not None:
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
        changed = json.loads(role_markers)
    except ValueError as error:
        raise InputError(f"--role-markers {role_markers}: not JSON ({error})") from None
    if not isinstance(changed, dict) or not all(isinstance(text, str) for text in changed.values()):
        raise InputError(f"--role-markers {role_markers}: give a JSON object of strings, one a role")
    for role, text in changed.items():
        role = {"human": "user", "bot": "assistant"}.get(role, role)
        if role not in markers:
            raise InputError(f"--role-markers: unknown role {role!r}; known: {', '.join(markers)}, human, bot")
        markers[role] = text
    return markers
