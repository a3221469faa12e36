"""Jinja chat templates, for example the one that comes with a model, as chat formats."""

import bisect
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mft_megatron.data.records.conversation import Conversation, RecordError
from mft_megatron.data.records.notes import RecordNotes
from mft_megatron.data.records.segments import PARTS, REASONING, Segment, left_out, raw_segments, turn_weights
from mft_megatron.data.tokenizers.beginnings import is_space
from mft_megatron.data.tokenizers.tokenizer import SpecialToken, Tokenizer
from mft_megatron.errors import InputError

from .jinja_parts import PartedRendering
from .jinja_renderer import Message, Renderer, TemplateError, renderer
from .jinja_rendering import Rendering
from .jinja_spans import TurnSpan
from .token_names import Span, names_in, names_of_text


@dataclasses.dataclass(frozen=True)
class TemplateFormat:
    """A Jinja template as a :class:`~mft_megatron.data.chat_templates.formats.ChatFormat`.

    The sample is the text that the template writes. Some templates leave out the reasoning of earlier rounds, as in
    inference; the sample then has only the reasoning of the last round.

    Attributes:
        name: that messages show.
        template: its source.
        variables: that the template gets beside the conversation.
        end_of_text: name of the end-of-text token.
        special_tokens: that its text may name.
        guarded: special tokens whose names are ordinary text in a turn.
        supervise: one of :data:`~mft_megatron.data.records.segments.SUPERVISE`.
        learn_empty_answers: empty answers are supervised, too.
        stop_token: token that ends an assistant's turn. This and the following fields are found by rendering a probe.
        openers: special tokens that open a turn.
        header: text before an assistant's content, if the template writes no generation prompt.
    """

    name: str
    template: str
    variables: Mapping[str, str]
    end_of_text: str
    special_tokens: Mapping[str, SpecialToken]
    guarded: frozenset[str]
    supervise: str = "all"
    learn_empty_answers: bool = False
    stop_token: str = ""
    openers: frozenset[str] = frozenset()
    header: str = ""

    @property
    def source(self) -> str:
        """Text of the Jinja template that writes conversations so."""
        return self.template

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that decides how a conversation is written."""
        content = [self.name, self.template, dict(self.variables), self.end_of_text, self.supervise]
        content += ["learn_empty_answers"] if self.learn_empty_answers else []
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def segments(self, conversation: Conversation, notes: RecordNotes | None = None) -> list[Segment]:
        """Write a conversation as segments of the whole sample, in order.

        Whitespace that a special token absorbs (``lstrip``, ``rstrip``) is left out, because it belongs to the token.

        Raises:
            RecordError: nothing in it is supervised, the template refuses it or does not write a part of it, or the
                assistant's spans are uncertain.
        """
        if conversation.raw:
            return raw_segments(conversation, self.end_of_text, self.learn_empty_answers, self.supervise)
        weights = turn_weights(conversation, self.supervise, notes, self.learn_empty_answers)
        rendering = PartedRendering(self, conversation)
        spans = rendering.spans(weights, self.supervise in PARTS)
        context = rendering.context(spans, self.supervise)
        segments = _split(rendering, spans, context, self.special_tokens)
        if not any(segment.supervised for segment in segments):
            if context:
                raise left_out(self.supervise)
            raise RecordError("nothing_to_learn", f"--chat-template {self.name} writes nothing of the supervised turns")
        if notes is not None:
            rendering.note_omissions(notes, weights, [span[:2] for span in spans])
        return segments

    def prompt(self, conversation: Conversation, index: int) -> str:
        """Write the prompt with which a server asks for turn ``index``; it gets no reasoning of earlier rounds.

        Raises:
            RecordError: the template refuses the turns, or does not write a part of the conversation.
        """
        questions = [number for number, turn in enumerate(conversation.turns[:index]) if turn.role == "user"]
        last_question = max(questions, default=0)
        turns = [
            dataclasses.replace(turn, extra={key: text for key, text in turn.extra.items() if key not in REASONING})
            if number < last_question
            else turn
            for number, turn in enumerate(conversation.turns)
        ]
        return Rendering(self, dataclasses.replace(conversation, turns=tuple(turns))).prompt(index)


def template_format(
    source: str, name: str, tokenizer: Tokenizer, supervise: str = "all", learn_empty_answers: bool = False
) -> TemplateFormat:
    """Make the format of a Jinja template.

    Args:
        source: text of the template.
        name: that messages show.
        tokenizer: of the data set.
        supervise: one of :data:`~mft_megatron.data.records.segments.SUPERVISE`.
        learn_empty_answers: empty answers are supervised, too.

    Raises:
        InputError: it is no Jinja template, cannot write a simple conversation, or its tags do not enclose exactly the
            assistant's text.
    """
    variables = {"eos_token": tokenizer.end_of_text}
    if tokenizer.bos_token is not None:
        variables["bos_token"] = tokenizer.bos_token
    # the name of a token in a turn is broken up, which one character cannot be; so it is text everywhere
    special = {text: token for text, token in tokenizer.special_tokens.items() if len(text) > 1}
    guarded = names_of_text(tokenizer)
    style = TemplateFormat(
        name, source, variables, tokenizer.end_of_text, special, guarded, supervise, learn_empty_answers
    )
    try:
        compiled = renderer(source)
        return dataclasses.replace(style, **_probe(style, compiled))
    except TemplateError as error:
        raise InputError(f"--chat-template {name}: {error}; give another template, or chatml") from None


_QUESTIONS, _ANSWERS = ("Qa", "Qb"), ("Ra", "Rb")


def _probe(style: TemplateFormat, compiled: Renderer) -> dict[str, Any]:
    """Render a conversation of two rounds; return the fields of :class:`TemplateFormat` that it shows."""
    messages: list[Message] = [
        {"role": role, "content": content}
        for pair in zip(_QUESTIONS, _ANSWERS, strict=True)
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]

    def render(messages: list[Message], prompt: bool = False, marks: tuple[str, str] | None = None) -> str:
        return compiled.render(messages, None, style.variables, prompt, marks)

    try:
        whole = render(messages)
    except TemplateError:  # it may require a system turn
        messages.insert(0, {"role": "system", "content": "S"})
        whole = render(messages)
    names = list(names_in(whole, style.special_tokens))
    written = whole.rfind(_ANSWERS[1])
    if written < 0:
        raise TemplateError("it leaves out the content of assistant turns")
    if not all(question in whole for question in _QUESTIONS):
        raise TemplateError("it leaves out the content of user turns")
    stop = next((name.text for name in names if name.start > written), style.end_of_text)
    asked, prompted = render(messages[:-3]), render(messages[:-3], prompt=True)
    openers = frozenset(name.text for name in names_in(prompted, style.special_tokens)) - {stop}
    header = ""
    if asked == prompted and whole.startswith(asked):
        header = whole[len(asked) : whole.find(_ANSWERS[0], len(asked))]
        header = header if header.strip() else ""  # whitespace before an answer belongs to the answer
    if compiled.tags:
        marks = "\ue000", "\ue001"
        tagged = "".join(re.findall(f"{marks[0]}(.*?){marks[1]}", render(messages, marks=marks), re.DOTALL))
        if not all(answer in tagged for answer in _ANSWERS) or any(question in tagged for question in _QUESTIONS):
            raise TemplateError("its generation tags do not enclose exactly the content of assistant turns")
    return {"stop_token": stop, "openers": openers, "header": header}


def _split(
    rendering: Rendering,
    spans: Sequence[TurnSpan],
    context: Sequence[Span],
    special_tokens: Mapping[str, SpecialToken],
) -> list[Segment]:
    """Split the text into segments, at the borders of spans and of context in them and at names of special tokens."""
    text = rendering.text
    borders = [border for span in spans for border in span[:2]]
    context_borders = [border for span in context for border in span]

    def is_context(position: int) -> bool:
        return bisect.bisect_right(context_borders, position) % 2 == 1

    segments: list[Segment] = []

    def write(start: int, end: int) -> None:
        while start < end:
            index = bisect.bisect_right(borders, start)
            next_border = min((border for border in context_borders if border > start), default=end)
            until = min(borders[index] if index < len(borders) else end, next_border, end)
            weight = spans[index // 2].weight if index % 2 else 0.0
            part = rendering.unguard(text[start:until])
            segments.append(Segment(part, weight, context=weight > 0 and is_context(start)))
            start = until

    written = 0
    for name in rendering.names:
        index = bisect.bisect_right(borders, name.start)
        supervised = index % 2 == 1
        weight = spans[index // 2].weight if supervised else 0.0
        if index < len(borders) and borders[index] < name.end:
            raise rendering.mismatch(f"a span of the assistant ends within {name.text}")
        token = special_tokens[name.text]
        start, end = name.start, name.end
        # a token absorbs whitespace beside it, but an unsupervised token absorbs no supervised whitespace
        if token.lstrip:
            limit = index - 1 - supervised
            limit = max(written, borders[limit] if limit >= 0 else 0)
            while start > limit and is_space(text[start - 1]):
                start -= 1
        if token.rstrip:
            limit = index + supervised
            limit = borders[limit] if limit < len(borders) else len(text)
            while end < limit and is_space(text[end]):
                end += 1
        write(written, start)
        segments.append(Segment(name.text, weight, True, context=supervised and is_context(name.start)))
        written = end
    write(written, len(text))
    return segments
