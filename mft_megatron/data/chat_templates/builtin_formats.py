"""Built-in chat formats. A new one is a function that writes turns, and an entry in :data:`FORMATS`."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from mft_megatron.data.records.conversation import Conversation, Turn
from mft_megatron.data.records.notes import RecordNotes
from mft_megatron.data.records.segments import Segment, raw_segments, refuse_reasoning, thinking_end, turn_weights

from .builtin_templates import chatml_template, mftcoder_template
from .token_names import names_of_text, names_pattern

if TYPE_CHECKING:
    from mft_megatron.data.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class BuiltInFormat:
    """A format of :data:`FORMATS`.

    Attributes:
        name: a key of :data:`FORMATS`.
        markers: text that opens the turn of each role.
        end_of_text: name of the tokenizer's end-of-text token.
        supervise: one of :data:`~mft_megatron.data.records.segments.SUPERVISE`.
        special: names of special tokens within the markers, which are these tokens, as in a prompt that a server
            tokenises; :func:`special_in_markers`.
        learn_empty_answers: empty answers are supervised, too.
    """

    name: str
    markers: Mapping[str, str]
    end_of_text: str
    supervise: str = "all"
    special: frozenset[str] = frozenset()
    learn_empty_answers: bool = False

    @property
    def stop_token(self) -> str:
        """Name of the token that ends an assistant's turn."""
        return FORMATS[self.name].stop_token or self.end_of_text

    def segments(self, conversation: Conversation, notes: RecordNotes | None = None) -> list[Segment]:
        """Write a conversation as segments of the whole sample, in order.

        Raises:
            RecordError: nothing in it is supervised, or a turn has reasoning, which these formats cannot write.
        """
        if conversation.raw:
            return raw_segments(conversation, self.end_of_text, self.learn_empty_answers, self.supervise)
        refuse_reasoning(
            conversation,
            f"which --chat-template {self.name} cannot write; use the model's own template, or move it into the "
            "content",
        )
        weights = turn_weights(conversation, self.supervise, notes, self.learn_empty_answers)
        turns = conversation.turns
        if conversation.tools:
            turns = _with_tools(turns, conversation.tools)
            weights = [0.0] * (len(turns) - len(weights)) + weights
        return FORMATS[self.name].write(self, turns, weights)

    def prompt(self, conversation: Conversation, index: int) -> str:
        """Write the prompt with which a server asks for turn ``index``."""
        turns = conversation.turns[:index]
        turns = _with_tools(turns, conversation.tools) if conversation.tools else turns
        written = FORMATS[self.name].write(self, turns, [0.0] * len(turns))
        return "".join(segment.text for segment in (*written, *self._openings["assistant"]))

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that decides how a conversation is written."""
        content: list[object] = [self.name, dict(self.markers), self.end_of_text, self.supervise]
        if self.special:
            content.append(sorted(self.special))
        if self.learn_empty_answers:
            content.append("learn_empty_answers")
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def source(self) -> str:
        """Jinja text that writes what :meth:`segments` writes, and the opening of an answer as generation prompt."""
        openings = {role: "".join(part.text for part in parts) for role, parts in self._openings.items()}
        before, after = _TOOLS.format(tools="\0").split("\0")
        return FORMATS[self.name].template(openings, self.stop_token, (before, after))

    # segments that are the same in every conversation
    @functools.cached_property
    def _openings(self) -> dict[str, tuple[Segment, ...]]:
        opening = FORMATS[self.name].opening
        return {
            role: tuple(part for segment in opening(marker) for part in _with_tokens(segment, self.special))
            for role, marker in self.markers.items()
        }

    @functools.cached_property
    def _unlearnt_stop(self) -> Segment:
        return Segment(self.stop_token, 0, True)

    def _answer(self, turn: Turn, weight: float) -> list[Segment]:
        """Write an answer and the token that ends it, which belongs to the calls where there are some.

        As Qwen2.5 and Hermes do it, calls follow the content.
        """
        content = [Segment(turn.content, weight)] if turn.content or not turn.tool_calls else []
        if content and self.supervise == "no-thinking" and (end := thinking_end(turn.content)):
            content = [Segment(turn.content[:end], weight, context=True), Segment(turn.content[end:], weight)]
        if content and turn.tool_calls:
            content.append(Segment("\n", weight))
        calls = _calls(turn, weight)
        calls.append(Segment(self.stop_token, weight, True))
        if self.supervise == "tool-calls-only":
            content = [segment._replace(context=True) for segment in content]
        if self.supervise == "no-tool-calls" and turn.tool_calls:
            calls = [segment._replace(context=True) for segment in calls]
        return [*content, *calls]


_BEGINNING = "<s>"  # of a marker: one token wherever the vocabulary has it


def special_in_markers(markers: Mapping[str, str], tokenizer: "Tokenizer") -> frozenset[str]:
    """Names of special tokens within markers that would be text if the markers were tokenised like content."""
    return names_of_text(tokenizer, [marker.removeprefix(_BEGINNING) for marker in markers.values()])


def _chatml_opening(marker: str) -> tuple[Segment, ...]:
    return Segment("<|im_start|>", False, True), Segment(f"{marker}\n", False)


def _mftcoder_opening(marker: str) -> tuple[Segment, ...]:
    rest = marker.removeprefix(_BEGINNING)
    beginning = (Segment(_BEGINNING, False, True),) if marker != rest else ()
    return (*beginning, Segment(rest, False)) if rest else beginning


def _with_tokens(segment: Segment, names: frozenset[str]) -> Iterator[Segment]:
    """Split a segment at the names of tokens in it."""
    if segment.special or not names:
        yield segment
        return
    start = 0
    for name in names_pattern(tuple(sorted(names))).finditer(segment.text):
        if name.start() > start:
            yield Segment(segment.text[start : name.start()], False)
        yield Segment(name.group(), False, True)
        start = name.end()
    if start < len(segment.text):
        yield Segment(segment.text[start:], False)


_NEWLINE = Segment("\n", False)


def _chatml(style: BuiltInFormat, turns: tuple[Turn, ...], weights: list[float]) -> list[Segment]:
    """``<|im_start|>role\\ncontent<|im_end|>\\n``. Answers of tools are between ``<tool_response>`` tags; consecutive
    ones share a turn. Qwen2.5 writes them in a turn of the user: ``--role-markers '{"tool": "user"}'``."""
    openings, stop = style._openings, style._unlearnt_stop
    written: list[Segment] = []
    role_before = None
    for turn, weight in zip(turns, weights, strict=True):
        role = turn.role
        if role == role_before == "tool":
            written[-2:] = (_NEWLINE,)
        else:
            written += openings[role]
        if role == "assistant":
            written += style._answer(turn, weight)
        else:
            written += _tag("tool_response", turn.content, 0) if role == "tool" else (Segment(turn.content, 0),)
            written.append(stop)
        written.append(_NEWLINE)
        role_before = role
    return written


def _mftcoder(style: BuiltInFormat, turns: tuple[Turn, ...], weights: list[float]) -> list[Segment]:
    """``<s>system\\n…\\n<s>human\\n…\\n<s>bot\\n…`` and the end-of-text token after each answer."""
    openings = style._openings
    written: list[Segment] = []
    for turn, weight in zip(turns, weights, strict=True):
        written += openings[turn.role]
        if turn.role != "assistant":
            written.append(Segment(f"{turn.content}\n", False))
        else:
            written += (*style._answer(turn, weight), _NEWLINE)
    return written


def _calls(turn: Turn, weight: float) -> list[Segment]:
    """Write the calls of an answer."""
    written: list[Segment] = []
    for call in turn.tool_calls:
        if written:
            written.append(Segment("\n", weight))
        name, arguments = _json(call["name"]), _json(call["arguments"])
        written += _tag("tool_call", f'{{"name": {name}, "arguments": {arguments}}}', weight)
    return written


def _tag(name: str, content: str, weight: float) -> tuple[Segment, ...]:
    """Write text between two tags; each tag is one token if the vocabulary has it, else text."""
    return Segment(f"<{name}>", weight, True), Segment(f"\n{content}\n", weight), Segment(f"</{name}>", weight, True)


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


@dataclasses.dataclass(frozen=True)
class FormatDefinition:
    """Everything that tells one built-in format from another.

    Attributes:
        write: writes turns, given the weight of each, 0 where it is not supervised.
        opening: segments that open a turn, from the marker of its role.
        template: the format as Jinja text, from the openings of turns by role, the stop token, and the text before and
            after a list of tools.
        markers: default marker of each role.
        stop_token: name of the token that ends an assistant's turn; ``None`` for the end-of-text token.
    """

    write: Callable[[BuiltInFormat, tuple[Turn, ...], list[float]], list[Segment]]
    opening: Callable[[str], tuple[Segment, ...]]
    template: Callable[[Mapping[str, str], str, tuple[str, str]], str]
    markers: Mapping[str, str]
    stop_token: str | None = None


FORMATS: dict[str, FormatDefinition] = {
    "chatml": FormatDefinition(
        write=_chatml,
        opening=_chatml_opening,
        template=chatml_template,
        markers={"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"},
        stop_token="<|im_end|>",
    ),
    "mftcoder": FormatDefinition(
        write=_mftcoder,
        opening=_mftcoder_opening,
        template=mftcoder_template,
        markers={"system": "<s>system\n", "user": "<s>human\n", "assistant": "<s>bot\n", "tool": "<s>tool\n"},
    ),
}
