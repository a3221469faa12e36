"""The model's own chat template as a format with the interface of the others."""

import bisect
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from mft_megatron.data.records.conversation import Conversation, RecordError
from mft_megatron.data.records.segments import Segment, raw_segments, supervised_turns
from mft_megatron.data.tokenizers.tokenizer import SpecialToken, Tokenizer
from mft_megatron.errors import InputError

from .jinja_renderer import Message, Renderer, Span, TemplateError, names_in, renderer
from .jinja_spans import Rendering


@dataclasses.dataclass(frozen=True)
class TemplateFormat:
    """A Jinja template with the interface of :class:`~mft_megatron.data.chat_templates.formats.ChatFormat`.

    The sample is what the template writes. Some templates leave out the reasoning of earlier rounds, as it is left out
    when the model answers: of such a record only the reasoning of the last round is learned.

    ``variables``: what the template gets beside the conversation. ``special_tokens``: that its text may name;
    ``guarded``: those of them that are plain text where a turn says them. ``stop_token``, ``openers``, ``header``:
    found by rendering a probe: the token that ends an assistant's turn, special tokens that open turns, and what stands
    before an assistant's content where the template writes no generation prompt.
    """

    name: str
    template: str
    variables: Mapping[str, str]
    end_of_text: str
    special_tokens: Mapping[str, SpecialToken]
    guarded: frozenset[str]
    supervise: str = "all"
    stop_token: str = ""
    openers: frozenset[str] = frozenset()
    header: str = ""

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides how a conversation is written."""
        content = [self.name, self.template, dict(self.variables), self.end_of_text, self.supervise]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def segments(self, conversation: Conversation) -> list[Segment]:
        """The whole sample in order.

        Whitespace that a special token takes with it (``lstrip``, ``rstrip``) is left out, as its token stands for it.

        Raises:
            RecordError: nothing in it is supervised; the template refuses it; or the assistant's part cannot be told.
        """
        if conversation.raw:
            return raw_segments(conversation, self.end_of_text)
        supervised = supervised_turns(conversation, self.supervise)
        rendering = Rendering(self, conversation)
        spans = rendering.spans(supervised)
        segments = _cut(rendering, spans, self.special_tokens)
        if not any(segment.supervised for segment in segments):
            raise RecordError(
                "nothing_to_learn", f"--chat-template {self.name} writes nothing of what is to be learned"
            )
        return segments


def template_format(source: str, name: str, tokenizer: Tokenizer, supervise: str = "all") -> TemplateFormat:
    """The format of a Jinja template.

    Args:
        source: text of the template.
        name: it is known by.
        tokenizer: of the data set.
        supervise: of :data:`~mft_megatron.data.records.segments.SUPERVISE`.

    Raises:
        InputError: it is no template, writes no plain conversation, or its tags do not enclose what the assistant says.
    """
    variables = {"eos_token": tokenizer.end_of_text}
    if tokenizer.bos_token is not None:
        variables["bos_token"] = tokenizer.bos_token
    # a name of one character cannot be broken up where a turn says it: it is text everywhere
    special = {text: token for text, token in tokenizer.special_tokens.items() if len(text) > 1}
    # tokens that the tokenizer makes of plain text, too (`<think>` in many), need no guard: they are meant to be said
    plain = tokenizer.encode_batch(list(special))
    guarded = frozenset(text for text, ids in zip(special, plain, strict=True) if ids != [special[text].id])
    style = TemplateFormat(name, source, variables, tokenizer.end_of_text, special, guarded, supervise)
    try:
        compiled = renderer(source)
        return dataclasses.replace(style, **_probe(style, compiled))
    except TemplateError as error:
        raise InputError(f"--chat-template {name}: {error}; give another template, or chatml") from None


_QUESTIONS, _ANSWERS = ("Qa", "Qb"), ("Ra", "Rb")


def _probe(style: TemplateFormat, compiled: Renderer) -> dict[str, Any]:
    """What a conversation of two rounds shows of a template."""
    messages = [
        {"role": role, "content": content}
        for pair in zip(_QUESTIONS, _ANSWERS, strict=True)
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]

    def render(messages: list[Message], **options) -> str:
        return compiled.render(messages, None, style.variables, **options)

    try:
        whole = render(messages)
    except TemplateError:  # it may insist on a system turn
        messages.insert(0, {"role": "system", "content": "S"})
        whole = render(messages)
    names = list(names_in(whole, style.special_tokens))
    written = whole.rfind(_ANSWERS[1])
    if written < 0:
        raise TemplateError("it leaves out what the assistant says")
    stop = next((name.text for name in names if name.start > written), style.end_of_text)
    asked, prompted = render(messages[:-3]), render(messages[:-3], prompt=True)
    openers = frozenset(name.text for name in names_in(prompted, style.special_tokens)) - {stop}
    header = ""
    if asked == prompted and whole.startswith(asked):
        header = whole[len(asked) : whole.find(_ANSWERS[0], len(asked))]
        header = header if header.strip() else ""  # the space before an answer is the assistant's
    if compiled.tags:
        marks = "\ue000", "\ue001"
        tagged = "".join(re.findall(f"{marks[0]}(.*?){marks[1]}", render(messages, marks=marks), re.DOTALL))
        if not all(answer in tagged for answer in _ANSWERS) or any(question in tagged for question in _QUESTIONS):
            raise TemplateError("its generation tags do not enclose what the assistant says and nothing else")
    return {"stop_token": stop, "openers": openers, "header": header}


def _cut(rendering: Rendering, spans: list[Span], special_tokens: Mapping[str, SpecialToken]) -> list[Segment]:
    """The text in segments, cut at the borders of spans and at names of special tokens."""
    text = rendering.text
    borders = [border for span in spans for border in span]
    segments: list[Segment] = []

    def write(start: int, end: int) -> None:
        while start < end:
            place = bisect.bisect_right(borders, start)
            until = min(borders[place], end) if place < len(borders) else end
            segments.append(Segment(rendering.unguard(text[start:until]), place % 2 == 1))
            start = until

    written = 0
    for name in rendering.names:
        place = bisect.bisect_right(borders, name.start)
        supervised = place % 2 == 1
        if place < len(borders) and borders[place] < name.end:
            raise rendering.mismatch(f"a part of the assistant ends within {name.text}")
        token = special_tokens[name.text]
        start, end = name.start, name.end
        # a token takes whitespace beside it along, but none of what is supervised where it is not
        if token.lstrip:
            limit = place - 1 - supervised
            limit = max(written, borders[limit] if limit >= 0 else 0)
            while start > limit and _is_space(text[start - 1]):
                start -= 1
        if token.rstrip:
            limit = place + supervised
            limit = borders[limit] if limit < len(borders) else len(text)
            while end < limit and _is_space(text[end]):
                end += 1
        write(written, start)
        segments.append(Segment(name.text, supervised, True))
        written = end
    write(written, len(text))
    return segments


def _is_space(character: str) -> bool:
    return character.isspace() and character not in "\x1c\x1d\x1e\x1f"  # which are none in Unicode
