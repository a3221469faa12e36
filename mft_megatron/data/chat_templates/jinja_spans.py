"""What a chat template writes of one conversation, and which part of that the assistant says.

The assistant's parts come from ``{% generation %}`` tags where the template has them. Elsewhere the conversation is
rendered up to a turn and up to its end, and both must be prefixes of the whole. Templates that write earlier turns in
another way once others follow (reasoning left out, tools moved to the last question) are asked what changes when one
turn is exchanged. Where nothing can be verified the record is refused: a mask is right, or there is none.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from mft_megatron.data.records.conversation import Conversation, RecordError, Turn
from mft_megatron.data.records.segments import REASONING, refuse_reasoning
from mft_megatron.data.tokenizers.tokenizer import SpecialToken

from .jinja_renderer import Message, Span, TemplateError, names_in, names_pattern, renderer


class TemplateStyle(Protocol):
    """The part of :class:`.jinja_format.TemplateFormat` that a rendering reads; its fields are explained there."""

    @property
    def name(self) -> str: ...
    @property
    def template(self) -> str: ...
    @property
    def variables(self) -> Mapping[str, str]: ...
    @property
    def special_tokens(self) -> Mapping[str, SpecialToken]: ...
    @property
    def guarded(self) -> frozenset[str]: ...
    @property
    def stop_token(self) -> str: ...
    @property
    def openers(self) -> frozenset[str]: ...
    @property
    def header(self) -> str: ...


class Rendering:
    """One conversation written by a template: ``text``, and the ``names`` of special tokens in it.

    Names of special tokens that the record itself says are broken up with ``guard``, a character that occurs nowhere
    else, so that they are neither cut out as tokens nor taken for the end of a turn.
    """

    def __init__(self, style: TemplateStyle, conversation: Conversation):
        self._style = style
        self._renderer = renderer(style.template)
        self._messages = [_message(turn) for turn in conversation.turns]
        self._tools = list(conversation.tools) or None
        self._refuse_lost_reasoning(conversation)
        said = "\0".join((*_strings(self._messages), *_strings(self._tools)))
        self._unused = _unused_characters(said + style.template)
        self.guard: str | None = None
        if style.stop_token not in style.guarded and style.stop_token in said:
            raise RecordError(
                "stop_token_in_content",
                f"a turn says {style.stop_token}, which this tokenizer takes for the stop token wherever it stands; "
                "mark it as special in the tokenizer, or leave the record out",
            )
        pattern = names_pattern(tuple(style.guarded))
        if pattern.search(said):
            unguarded = self._render(self._messages)
            self.guard = guard = next(self._unused)
            self._messages = [
                {"role": message.pop("role"), **_map_strings(message, functools.partial(_break_up, pattern, guard))}
                for message in self._messages
            ]
            self._tools = _map_strings(self._tools, functools.partial(_break_up, pattern, guard))
        self.text = self._render(self._messages)
        if self.guard and self.unguard(self.text) != unguarded:
            raise RecordError(
                "special_token_in_content",
                f"--chat-template {style.name} acts on the name of a special token that a turn says; leave the record "
                "out, or use chatml",
            )
        self._refuse_what_is_not_written()
        self.names = list(names_in(self.text, style.special_tokens))

    def unguard(self, text: str) -> str:
        """The text as the record has it."""
        if self.guard is None:
            return text
        return text.replace(self.guard, "").replace(f"\\u{ord(self.guard):04x}", "")  # the latter in ASCII JSON

    def spans(self, supervised: list[bool]) -> list[Span]:
        """What is supervised, in order: the assistant's parts with the tokens that end them.

        Raises:
            RecordError: they cannot be told with certainty.
        """
        if self._renderer.tags:
            spans = self._tagged_spans(supervised)
        else:
            spans = [self._prefix_span(number) for number, learn in enumerate(supervised) if learn]
        borders = [border for span in spans for border in span]
        if borders != sorted(borders):
            raise self.mismatch("parts of the assistant overlap")
        return spans

    def _render(self, messages: list[Message], **options) -> str:
        try:
            return self._renderer.render(messages, self._tools, self._style.variables, **options)
        except TemplateError as error:
            raise RecordError("template_error", f"--chat-template {self._style.name} refuses it: {error}") from None

    def _try(self, messages: list[Message], **options) -> str | None:
        """The text of other messages; ``None`` where the template refuses them."""
        try:
            return self._render(messages, **options)
        except RecordError:
            return None

    def _exchanged(self, number: int, message: Message) -> list[Message]:
        return [*self._messages[:number], message, *self._messages[number + 1 :]]

    # with generation tags

    def _tagged_spans(self, supervised: list[bool]) -> list[Span]:
        marks = next(self._unused), next(self._unused)
        text, spans = self._enclosed(self._messages, marks)
        if text != self.text:
            raise self.mismatch("what its generation tags enclose is changed before it is written")
        answers = [number for number, message in enumerate(self._messages) if message["role"] == "assistant"]
        if all(supervised[number] for number in answers):
            if len(spans) < len(answers):
                raise self.mismatch(f"its generation tags enclose {len(spans)} of {len(answers)} assistant turns")
            return [self._ended(*span, tagged=True) for span in spans]
        # a turn's spans are those whose text changes when the turn says something else
        enclosed = [text[start:end] for start, end in spans]
        owned: list[int] = []
        for number in (number for number in answers if supervised[number]):
            other = _map_strings(self._messages[number], functools.partial(_exchange, next(self._unused)))
            other.update(role="assistant", content=next(self._unused))
            try:
                text, others = self._enclosed(self._exchanged(number, other), marks)
            except RecordError:
                others = []
            own = [place for place, span in enumerate(others) if enclosed[place : place + 1] != [text[slice(*span)]]]
            if len(others) != len(spans) or not own or set(own) & set(owned):
                raise self.mismatch(f"its generation tags do not tell turn {number} from the others")
            owned += own
        return [self._ended(*spans[place], tagged=True) for place in sorted(owned)]

    def _enclosed(self, messages: list[Message], marks: tuple[str, str]) -> tuple[str, list[Span]]:
        """The text that the template writes, and what its generation tags enclose."""
        parts, spans, depth, begun, written = [], [], 0, 0, 0
        for part in re.split(f"([{''.join(marks)}])", self._render(messages, marks=marks)):
            if part == marks[0]:
                depth += 1
                begun = written if depth == 1 else begun
            elif part == marks[1]:
                depth -= 1
                if depth == 0:
                    spans.append((begun, written))
            else:
                parts.append(part)
                written += len(part)
        return "".join(parts), spans

    # without

    def _prefix_span(self, number: int) -> Span:
        """What the assistant says in one turn, to the end of the token that ends it."""
        start = self._start(number)
        if number == len(self._messages) - 1:
            return self._ended(start, len(self.text))
        through = self._try(self._messages[: number + 1])
        if through is not None and len(through) >= start and self.text.startswith(through):
            return self._ended(start, len(through))
        # the turn is written in another way once others follow: it ends with the first stop token, if that stands
        # before anything that depends on what the next turn says
        other = self._try(self._exchanged(number + 1, {**self._messages[number + 1], "content": next(self._unused)}))
        same = _common_prefix(self.text, other) if other is not None else 0
        stop = next((name for name in self.names if name.start >= start and name.text == self._style.stop_token), None)
        if stop is None or stop.end > same:
            raise self.mismatch(f"it writes turn {number} in another way once others follow")
        return start, stop.end

    def _start(self, number: int) -> int:
        before = self._try(self._messages[:number], prompt=True)
        if before is not None and self.text.startswith(before + self._style.header):
            return len(before + self._style.header)
        # the place from which the text depends on what the turn says
        ours, theirs = next(self._unused), next(self._unused)
        texts = [self._try(self._exchanged(number, {"role": "assistant", "content": said})) for said in (ours, theirs)]
        if None not in texts:
            start = _common_prefix(*texts)
            once = texts[0].startswith(ours, start) and texts[0].count(ours) == 1
            if once and self.text.startswith(texts[0][:start]):
                return start
        raise self.mismatch(f"what it writes before turn {number} is not the beginning of the whole")

    def _ended(self, start: int, end: int, tagged: bool = False) -> Span:
        """A span with the token that ends it as its end."""
        stop = self._style.stop_token
        inside = [name for name in self.names if start <= name.start and name.end <= end]
        for name in inside:
            if name.text == stop:
                return start, name.end
        follower = next((name for name in self.names if name.start >= end), None)
        if follower is not None and follower.text == stop and not self.text[end : follower.start].strip():
            return start, follower.end
        # another token may end a turn that calls a tool
        closers = [name for name in inside if name.text in self._style.guarded]
        if closers and not self.text[closers[-1].end : end].strip():
            return start, closers[-1].end
        if tagged and follower is not None and follower.start == end and follower.text not in self._style.openers:
            return start, follower.end
        return start, end

    def _refuse_lost_reasoning(self, conversation: Conversation) -> None:
        if any(name in self._style.template for name in REASONING):
            return
        refuse_reasoning(
            conversation,
            f"which --chat-template {self._style.name} does not write; use a template that does, or move it into the "
            "content",
        )

    def _refuse_what_is_not_written(self) -> None:
        """Many templates pass over a system turn, tools or calls of tools that they were not made for. All of it is
        exchanged for words of its own, and each must be in the text."""
        words = _Words(next(self._unused))
        messages = [words.instead_of(number, message) for number, message in enumerate(self._messages)]
        tools = [words.instead_of_tool(number, tool) for number, tool in enumerate(self._tools or ()) if tool]
        if not words.given:
            return
        try:
            text = self._renderer.render(messages, tools or None, self._style.variables)
        except TemplateError:
            return  # it looks at what it refuses
        for word, (reason, what) in words.given.items():
            if not words.written(word, text):
                raise RecordError(
                    reason,
                    f"--chat-template {self._style.name} does not write {what}; use a template that does, or chatml, "
                    "or take it out of the record",
                )

    def mismatch(self, what: str) -> RecordError:
        return RecordError(
            "template_mismatch",
            f"--chat-template {self._style.name}: {what}, so the assistant's part cannot be told for certain; give a "
            "template with {% generation %} tags around it, or use chatml",
        )


class _Words:
    """Words that no record says, to stand where a system turn, tools, calls of tools or the answers of tools stand.

    ``given``: for each word the reason that a record is counted under where it is not written, and what that is.
    """

    def __init__(self, unused: str):
        self._unused = unused
        self.given: dict[str, tuple[str, str]] = {}

    def written(self, word: str, text: str) -> bool:
        return word in text or word.replace(self._unused, f"\\u{ord(self._unused):04x}") in text

    def _word(self, reason: str, what: str) -> str:
        word = f"{self._unused}{len(self.given)}{self._unused}"
        self.given[word] = reason, what
        return word

    def instead_of(self, number: int, message: Message) -> Message:
        role, calls = message["role"], message.get("tool_calls")
        other = dict(message)
        if message["content"].strip():
            if role == "system":
                other["content"] = self._word("system_has_no_place", "the system turn")
            elif role == "tool":
                other["content"] = self._word("tools_have_no_place", f"the tool's answer in turn {number}")
            elif calls:
                other["content"] = self._word("content_has_no_place", f"what turn {number} says beside its tool call")
        if calls:
            other["tool_calls"] = [self._instead_of_call(number, call) for call in calls]
        return other

    def _instead_of_call(self, number: int, call: Mapping[str, Any]) -> Mapping[str, Any]:
        what = f"the tool call of turn {number}"
        function = {"name": self._word("tools_have_no_place", what), "arguments": call["function"]["arguments"]}
        if function["arguments"]:
            word = self._word("tools_have_no_place", f"the arguments of {what}")
            function["arguments"] = dict.fromkeys(function["arguments"], word)
        return {**call, "function": function}

    def instead_of_tool(self, number: int, tool: Mapping[str, Any]) -> Mapping[str, Any]:
        """Another name for it; where it has none, for all that it says."""
        word = self._word("tools_have_no_place", f"tool {number} of the record")
        function = tool.get("function")
        if isinstance(function, Mapping) and "name" in function:
            return {**tool, "function": {**function, "name": word}}
        if "name" in tool:
            return {**tool, "name": word}
        return _map_strings(tool, functools.partial(_exchange, word))


def _message(turn: Turn) -> Message:
    """A turn as in OpenAI's API; its reasoning under each of the names that templates read."""
    message = {"role": turn.role, "content": turn.content, **turn.extra}
    reasoning = next((turn.extra[name] for name in REASONING if turn.extra.get(name) is not None), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    if turn.tool_calls:
        message["tool_calls"] = [
            {
                **({"id": call["id"]} if "id" in call else {}),
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for call in turn.tool_calls
        ]
    return message


def _break_up(pattern: re.Pattern, guard: str, text: str) -> str:
    """The text with ``guard`` between the characters of each name in it, overlapping ones, too."""
    while pattern.search(text):
        text = pattern.sub(lambda match: guard.join(match.group()), text)
    return text


def _strings(value: Any) -> Iterator[str]:
    """Every string in nested lists and dicts, keys, too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value


def _exchange(other: str, text: str) -> str:
    return text if text in _STRUCTURE or not text else other


# strings of a message that are not said but tell templates how it is built
_STRUCTURE = frozenset({"content", *REASONING, "tool_calls", "type", "function", "name", "arguments"})


def _unused_characters(text: str) -> Iterator[str]:
    """Private-use characters that do not occur in a text, nor as JSON escapes them in ASCII."""
    return (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text and f"\\u{code:04x}" not in text)


def _common_prefix(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    same, most = 0, min(len(one), len(other))
    while same < most:
        middle = (same + most + 1) // 2
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            most = middle - 1
    return same
