"""Rendering one conversation with a template, in the form that the template expects."""

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from mft_megatron.data.records.conversation import Conversation, RecordError
from mft_megatron.data.records.notes import RecordNotes
from mft_megatron.data.records.segments import REASONING, refuse_reasoning
from mft_megatron.data.tokenizers.tokenizer import SpecialToken

from .format_names import shown_format
from .jinja_coverage import unwritten_part
from .jinja_messages import break_names, message_of, strings_in, unused_characters
from .jinja_omissions import count_changed_answers, count_omitted_reasoning
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


# forms of messages with tool calls: arguments as JSON text, and None for a content that is empty
_FORMS = ((False, False), (False, True), (True, False), (True, True))
# reasons of a refusal that another form may not have
_REASONS_OF_FORMS = frozenset({"template_error", "tools_have_no_place", "content_has_no_place"})


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
        self._turns = conversation.turns
        self._refuse_lost_reasoning(conversation)
        # templates differ in the form in which they expect tool calls; the first in which all is written is theirs
        forms = _FORMS if any(turn.tool_calls for turn in conversation.turns) else _FORMS[:1]
        failure: RecordError | None = None
        for form in forms:
            try:
                self._render_whole([message_of(turn, *form) for turn in conversation.turns], conversation.tools)
                return
            except RecordError as error:
                failure = failure or error
                if error.reason not in _REASONS_OF_FORMS:
                    break
        assert failure is not None
        raise failure

    def _render_whole(self, messages: list[Message], tools: Sequence[Mapping[str, object]]) -> None:
        style = self._style
        self._messages = messages
        self._tools: list[Mapping[str, object]] | None = list(tools) or None
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
        self._refuse_python_arguments(record_text)
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
                f"{shown_format(self._style.name)} acts on the name of a special token in a turn; leave the record "
                "out, or use chatml",
            )
        return text

    def unguard(self, text: str) -> str:
        """Remove the guards from a text."""
        if self.guard is None:
            return text
        return text.replace(self.guard, "").replace(f"\\u{ord(self.guard):04x}", "")  # the latter in ASCII JSON

    def _render(self, messages: list[Message], prompt: bool = False, marks: tuple[str, str] | None = None) -> str:
        try:
            return self._renderer.render(messages, self._tools, self._style.variables, prompt, marks)
        except TemplateError as error:
            raise RecordError("template_error", f"{shown_format(self._style.name)} refuses it: {error}") from None

    def _refuse_lost_reasoning(self, conversation: Conversation) -> None:
        if any(name in self._style.template for name in REASONING):
            return
        refuse_reasoning(
            conversation,
            f"which {shown_format(self._style.name)} does not write; use a template that does, or move it into the "
            "content",
        )

    def _refuse_unwritten(self) -> None:
        unused = next(self._unused)
        unwritten = unwritten_part(self._renderer, self._messages, self._tools or (), self._style.variables, unused)
        if unwritten is not None:
            raise RecordError(
                unwritten.reason,
                f"{shown_format(self._style.name)} does not write {unwritten.part}; use a template that does, or "
                "chatml, or take it out of the record",
            )

    def _refuse_python_arguments(self, record_text: str) -> None:
        """Refuse arguments of a tool call that a template which expects text writes as Python does, not as JSON."""
        text = self.unguard(self.text)
        calls = (call for turn in self._turns for call in turn.tool_calls if call["arguments"])
        for call in calls:
            if text.count(str(call["arguments"])) > record_text.count(str(call["arguments"])):
                raise RecordError(
                    "template_error",
                    f"{shown_format(self._style.name)} writes the arguments of the tool call {call['name']} as "
                    f"{str(call['arguments'])[:60]}, which is not JSON; use a template that writes JSON, or chatml",
                )

    def note_omissions(self, notes: RecordNotes, weights: Sequence[float], spans: Sequence[Span]) -> None:
        """Count answers that the template changes, and reasoning that it leaves out.

        Args:
            notes: counts to add to.
            weights: of each turn, 0 where it is not supervised.
            spans: of the supervised turns.
        """
        turns = [turn for turn, learn in zip(self._turns, weights, strict=True) if learn]
        count_changed_answers(notes, turns, [self.unguard(self.text[start:end]) for start, end in spans])
        count_omitted_reasoning(
            notes, self._renderer, self._messages, self._tools, self._style.variables, next(self._unused)
        )

    def prompt(self, index: int) -> str:
        """Render the turns before one and the generation prompt, as a server does; names in turns are not broken up.

        Newer versions of transformers (5.23) remove the keys of a message that are ``None``, such as a content beside
        calls, before the template sees it; older ones do not.

        Raises:
            RecordError: the template refuses these turns.
        """
        messages = [{key: part for key, part in turn.items() if part is not None} for turn in self._messages[:index]]
        try:
            return self.unguard(self._render(messages, prompt=True))
        except RecordError as error:
            self._render(self._messages[:index], prompt=True)  # raises the same where this is not the reason
            raise RecordError(
                error.reason,
                f"{error}, as newer versions of transformers (5.23) remove the content of a turn with calls where it "
                "is null; let the template test 'not message.content' instead of 'is none'",
            ) from None

    def mismatch(self, fault: str) -> RecordError:
        """Make the error for a conversation whose assistant spans are uncertain; ``fault`` says why."""
        return RecordError(
            "template_mismatch",
            f"{shown_format(self._style.name)}: {fault}, so the assistant's part cannot be told for certain; give a "
            "template with {% generation %} tags around it, or use chatml",
        )
