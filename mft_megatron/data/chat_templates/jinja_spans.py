"""Rendering one conversation with a template, and finding the spans of the text that the assistant says.

If the template has ``{% generation %}`` tags, they give the spans. Otherwise the conversation is rendered up to the
beginning and up to the end of a turn, and both texts must be prefixes of the whole. Some templates write earlier turns
differently once others follow: they leave out reasoning, or move tools to the last question. For these, one turn is
replaced and the texts are compared. A record whose spans cannot be verified is refused: a mask is right, or there is
none.
"""

import re
from collections.abc import Mapping
from typing import Protocol

from mft_megatron.data.records.conversation import Conversation, RecordError
from mft_megatron.data.records.segments import REASONING, refuse_reasoning
from mft_megatron.data.tokenizers.tokenizer import SpecialToken

from .jinja_coverage import unwritten_part
from .jinja_messages import break_names, message_of, replace_content, strings_in, unused_characters
from .jinja_renderer import Message, TemplateError, renderer
from .token_names import Name, Span, names_in, names_pattern


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
    """One conversation written by a template.

    Names of special tokens in the record itself are broken up with ``guard``, so that they become neither tokens nor
    the end of a turn.

    Attributes:
        text: of the conversation, with guards.
        names: names of special tokens in the text.
        guard: a character that occurs nowhere else; ``None`` if the record has no such names.
    """

    def __init__(self, style: TemplateStyle, conversation: Conversation):
        """Render a conversation.

        Raises:
            RecordError: the template refuses the conversation, does not write a part of it, or acts on the name of a
                special token in it.
        """
        self._style = style
        self._renderer = renderer(style.template)
        self._messages = [message_of(turn) for turn in conversation.turns]
        self._tools: list[Mapping[str, object]] | None = list(conversation.tools) or None
        self._refuse_lost_reasoning(conversation)
        record_text = "\0".join((*strings_in(self._messages), *strings_in(self._tools)))
        self._unused = unused_characters(record_text + style.template)
        if style.stop_token not in style.guarded and style.stop_token in record_text:
            raise RecordError(
                "stop_token_in_content",
                f"a turn contains {style.stop_token}, which this tokenizer always reads as the stop token; mark it as "
                "special in the tokenizer, or leave the record out",
            )
        self.guard: str | None = None
        pattern = names_pattern(tuple(style.guarded))
        if pattern.search(record_text):
            self.text = self._guarded_text(pattern)
        else:
            self.text = self._render(self._messages)
        self._refuse_unwritten()
        self.names: list[Name] = list(names_in(self.text, style.special_tokens))

    def _guarded_text(self, pattern: re.Pattern[str]) -> str:
        """Break up names in messages and tools, and render them; the text without guards must not change."""
        unguarded = self._render(self._messages)
        self.guard = guard = next(self._unused)
        self._messages = [
            {"role": message.pop("role"), **break_names(message, pattern, guard)} for message in self._messages
        ]
        self._tools = break_names(self._tools, pattern, guard)
        text = self._render(self._messages)
        if self.unguard(text) != unguarded:
            raise RecordError(
                "special_token_in_content",
                f"--chat-template {self._style.name} acts on the name of a special token in a turn; leave the record "
                "out, or use chatml",
            )
        return text

    def unguard(self, text: str) -> str:
        """Remove the guards from a text."""
        if self.guard is None:
            return text
        return text.replace(self.guard, "").replace(f"\\u{ord(self.guard):04x}", "")  # the latter in ASCII JSON

    def spans(self, supervised: list[bool]) -> list[Span]:
        """Find the supervised spans: the assistant's text, with the tokens that end it.

        Args:
            supervised: whether each turn is supervised.

        Returns:
            spans of ``text``, in order.

        Raises:
            RecordError: they cannot be determined with certainty.
        """
        if self._renderer.tags:
            spans = self._tagged_spans(supervised)
        else:
            spans = [self._span_by_prefixes(index) for index, learn in enumerate(supervised) if learn]
        borders = [border for span in spans for border in span]
        if borders != sorted(borders):
            raise self.mismatch("the assistant's spans overlap")
        return spans

    def _render(self, messages: list[Message], prompt: bool = False, marks: tuple[str, str] | None = None) -> str:
        try:
            return self._renderer.render(messages, self._tools, self._style.variables, prompt, marks)
        except TemplateError as error:
            raise RecordError("template_error", f"--chat-template {self._style.name} refuses it: {error}") from None

    def _render_if_accepted(self, messages: list[Message], prompt: bool = False) -> str | None:
        """Render other messages; ``None`` if the template refuses them."""
        try:
            return self._render(messages, prompt)
        except RecordError:
            return None

    def _with_message(self, index: int, message: Message) -> list[Message]:
        return [*self._messages[:index], message, *self._messages[index + 1 :]]

    # spans with generation tags

    def _tagged_spans(self, supervised: list[bool]) -> list[Span]:
        marks = next(self._unused), next(self._unused)
        text, spans = self._enclosed(self._messages, marks)
        if text != self.text:
            raise self.mismatch("the text in its generation tags is changed before it is written")
        answers = [index for index, message in enumerate(self._messages) if message["role"] == "assistant"]
        if all(supervised[index] for index in answers):
            if len(spans) < len(answers):
                raise self.mismatch(f"its generation tags enclose {len(spans)} of {len(answers)} assistant turns")
            return [self._with_stop_token(*span, tagged=True) for span in spans]
        # the spans of a turn are those whose text changes if the turn has other content
        enclosed = [text[start:end] for start, end in spans]
        chosen: list[int] = []
        for index in (index for index in answers if supervised[index]):
            other = replace_content(self._messages[index], next(self._unused))
            other.update(role="assistant", content=next(self._unused))
            try:
                text, other_spans = self._enclosed(self._with_message(index, other), marks)
            except RecordError:
                other_spans = []
            changed = [k for k, span in enumerate(other_spans) if enclosed[k : k + 1] != [text[slice(*span)]]]
            if len(other_spans) != len(spans) or not changed or set(changed) & set(chosen):
                raise self.mismatch(f"its generation tags do not distinguish turn {index} from the others")
            chosen += changed
        return [self._with_stop_token(*spans[k], tagged=True) for k in sorted(chosen)]

    def _enclosed(self, messages: list[Message], marks: tuple[str, str]) -> tuple[str, list[Span]]:
        """Render messages; return the text, and the spans of it that generation tags enclose."""
        parts: list[str] = []
        spans: list[Span] = []
        depth = start = written = 0
        for part in re.split(f"([{''.join(marks)}])", self._render(messages, marks=marks)):
            if part == marks[0]:
                depth += 1
                start = written if depth == 1 else start
            elif part == marks[1]:
                depth -= 1
                if depth == 0:
                    spans.append((start, written))
            else:
                parts.append(part)
                written += len(part)
        return "".join(parts), spans

    # spans without generation tags

    def _span_by_prefixes(self, index: int) -> Span:
        """Find the assistant's text in one turn, with the token that ends it."""
        start = self._start_of(index)
        if index == len(self._messages) - 1:
            return self._with_stop_token(start, len(self.text))
        through = self._render_if_accepted(self._messages[: index + 1])
        if through is not None and len(through) >= start and self.text.startswith(through):
            return self._with_stop_token(start, len(through))
        # The turn is written differently once others follow. It then ends with the first stop token, provided that this
        # comes before any text that depends on the content of the next turn.
        next_message = {**self._messages[index + 1], "content": next(self._unused)}
        other = self._render_if_accepted(self._with_message(index + 1, next_message))
        same = _common_prefix(self.text, other) if other is not None else 0
        stop = next((name for name in self.names if name.start >= start and name.text == self._style.stop_token), None)
        if stop is None or stop.end > same:
            raise self.mismatch(f"it writes turn {index} differently once others follow")
        return start, stop.end

    def _start_of(self, index: int) -> int:
        before = self._render_if_accepted(self._messages[:index], prompt=True)
        if before is not None and self.text.startswith(before + self._style.header):
            return len(before + self._style.header)
        # the text depends on the content of the turn from its start on
        ours, theirs = next(self._unused), next(self._unused)
        one, other = (
            self._render_if_accepted(self._with_message(index, {"role": "assistant", "content": content}))
            for content in (ours, theirs)
        )
        if one is not None and other is not None:
            start = _common_prefix(one, other)
            once = one.startswith(ours, start) and one.count(ours) == 1
            if once and self.text.startswith(one[:start]):
                return start
        raise self.mismatch(f"the text that it writes before turn {index} is not the beginning of the whole")

    def _with_stop_token(self, start: int, end: int, tagged: bool = False) -> Span:
        """Move the end of a span to the end of the token that ends the turn."""
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

    def _refuse_unwritten(self) -> None:
        unused = next(self._unused)
        unwritten = unwritten_part(self._renderer, self._messages, self._tools or (), self._style.variables, unused)
        if unwritten is not None:
            raise RecordError(
                unwritten.reason,
                f"--chat-template {self._style.name} does not write {unwritten.part}; use a template that does, or "
                "chatml, or take it out of the record",
            )

    def mismatch(self, fault: str) -> RecordError:
        """Make the error for a conversation whose assistant spans are uncertain; ``fault`` says why."""
        return RecordError(
            "template_mismatch",
            f"--chat-template {self._style.name}: {fault}, so the assistant's part cannot be told for certain; give a "
            "template with {% generation %} tags around it, or use chatml",
        )


def _common_prefix(one: str, other: str) -> int:
    """Count the characters with which both texts begin."""
    same, most = 0, min(len(one), len(other))
    while same < most:
        middle = (same + most + 1) // 2
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            most = middle - 1
    return same
