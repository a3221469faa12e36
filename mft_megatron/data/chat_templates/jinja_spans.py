"""Finding the spans of a rendered conversation that the assistant says.

If the template has ``{% generation %}`` tags, they give the spans. Otherwise the conversation is rendered up to the
beginning and up to the end of a turn, and both texts must be prefixes of the whole. Some templates write earlier turns
differently once others follow: they leave out reasoning, or move tools to the last question. For these, one turn is
replaced and the texts are compared. A record whose spans cannot be verified is refused: a mask is right, or there is
none.
"""

import re
from typing import NamedTuple

from mft_megatron.data.records.conversation import RecordError

from .jinja_messages import replace_content
from .jinja_renderer import Message
from .jinja_rendering import Rendering
from .token_names import Span, common_prefix


class TurnSpan(NamedTuple):
    """A part of a text that an assistant's turn says.

    Attributes:
        start, end: index of the first character, and of the one after the last.
        weight: of its tokens, above 0.
        turn: index of the turn; -1 where nobody needs it.
    """

    start: int
    end: int
    weight: float
    turn: int


class SpannedRendering(Rendering):
    """A rendering, and the supervised spans of its text."""

    def spans(self, weights: list[float], by_turn: bool = False) -> list[TurnSpan]:
        """Find the supervised spans: the assistant's text, with the tokens that end it.

        Args:
            weights: of each turn, 0 where it is not supervised.
            by_turn: the turn of each span is needed.

        Returns:
            spans of ``text``, in order.

        Raises:
            RecordError: they cannot be determined with certainty.
        """
        if self._renderer.tags:
            spans = self._tagged_spans(weights, by_turn)
        else:
            learnt = [index for index, weight in enumerate(weights) if weight]
            spans = [TurnSpan(*self._span_by_prefixes(index), weights[index], index) for index in learnt]
        borders = [border for span in spans for border in span[:2]]
        if borders != sorted(borders):
            raise self.mismatch("the assistant's spans overlap")
        return spans

    def _render_if_accepted(self, messages: list[Message], prompt: bool = False) -> str | None:
        """Render other messages; ``None`` if the template refuses them."""
        try:
            return self._render(messages, prompt)
        except RecordError:
            return None

    def _with_message(self, index: int, message: Message) -> list[Message]:
        return [*self._messages[:index], message, *self._messages[index + 1 :]]

    # spans with generation tags

    def _tagged_spans(self, weights: list[float], by_turn: bool) -> list[TurnSpan]:
        marks = next(self._unused), next(self._unused)
        text, spans = self._enclosed(self._messages, marks)
        if text != self.text:
            raise self.mismatch("the text in its generation tags is changed before it is written")
        answers = [index for index, message in enumerate(self._messages) if message["role"] == "assistant"]
        of_answers = {weights[index] for index in answers}
        if 0 not in of_answers and len(spans) < len(answers):
            raise self.mismatch(f"its generation tags enclose {len(spans)} of {len(answers)} assistant turns")
        if 0 not in of_answers and len(of_answers) == 1 and not by_turn:
            weight = of_answers.pop()
            return [TurnSpan(*self._with_stop_token(*span, tagged=True), weight, -1) for span in spans]
        # the spans of a turn are those whose text changes if the turn has other content
        enclosed = [text[start:end] for start, end in spans]
        chosen: dict[int, int] = {}  # turn by span
        for index in (index for index in answers if weights[index]):
            other = replace_content(self._messages[index], next(self._unused))
            other.update(role="assistant", content=next(self._unused))
            try:
                text, other_spans = self._enclosed(self._with_message(index, other), marks)
            except RecordError:
                other_spans = []
            changed = [k for k, span in enumerate(other_spans) if enclosed[k : k + 1] != [text[slice(*span)]]]
            if len(other_spans) != len(spans) or not changed or set(changed) & chosen.keys():
                raise self.mismatch(f"its generation tags do not distinguish turn {index} from the others")
            chosen.update(dict.fromkeys(changed, index))
        return [
            TurnSpan(*self._with_stop_token(*spans[k], tagged=True), weights[turn], turn)
            for k, turn in sorted(chosen.items())
        ]

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
        same = common_prefix(self.text, other) if other is not None else 0
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
            start = common_prefix(one, other)
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
