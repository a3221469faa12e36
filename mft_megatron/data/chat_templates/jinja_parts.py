"""Finding the parts of rendered answers that ``--supervise`` makes context: reasoning, or tool calls, or all else.

A part of a turn is replaced by a word that no record contains; the text then changes from that part on. What the
template writes after the reasoning that the turn has, or could have, tells its marks from the answer's.
"""

import re
from collections.abc import Sequence

from mft_megatron.data.records.conversation import RecordError
from mft_megatron.data.records.segments import PARTS, REASONING, thinking_end

from .format_names import shown_format
from .jinja_messages import replace_content
from .jinja_renderer import Message
from .jinja_spans import SpannedRendering, TurnSpan
from .token_names import Span, common_prefix, names_in

# what may close a reasoning, with the spaces around it: </think>, [/THINK], <|END_THINKING|>, <|end|>
_CLOSING = re.compile(r"\s*(<[^<>]*>|\[/[^\[\]]*\])\s*")


class PartedRendering(SpannedRendering):
    """A rendering, its supervised spans, and the parts of them that are context."""

    def context(self, spans: Sequence[TurnSpan], supervise: str) -> list[Span]:
        """Find the parts of supervised turns that are not supervised themselves.

        A token that ends the turn belongs to the calls where there are some, and spaces between two parts to the first.

        Args:
            spans: of the supervised turns.
            supervise: of :data:`~mft_megatron.data.records.segments.SUPERVISE`.

        Returns:
            spans of ``text``, in order.

        Raises:
            RecordError: they cannot be determined with certainty.
        """
        if supervise not in PARTS:
            return []
        context: list[Span] = []
        for turn in sorted({span.turn for span in spans}):
            start = min(span.start for span in spans if span.turn == turn)
            end = max(span.end for span in spans if span.turn == turn)
            if supervise == "no-thinking":
                context.append((start, self._after_reasoning(turn, start, end)))
            elif self._messages[turn].get("tool_calls"):
                calls = self._start_of_calls(turn, start, end)
                context.append((start, calls) if supervise == "tool-calls-only" else (calls, end))
        return [(start, end) for start, end in context if start < end]

    def _after_reasoning(self, turn: int, start: int, end: int) -> int:
        """Index of the first character after the reasoning of a turn and its marks; ``start`` where it has none."""
        answer = self._start_of_answer(turn, start, end)
        lead = self.text[start:answer]
        if not lead.strip():
            return start
        word = next(self._unused)
        message = dict(self._messages[turn])
        cut = self._thinking_end(message)
        if cut:
            message["content"] = f"<think>\n{word}\n</think>\n\n{message['content'][cut:]}"
        else:
            message.update(dict.fromkeys(REASONING, word))
        other = self._render_if_accepted(self._with_message(turn, message))
        if other is None or word not in other:
            # the template leaves out the reasoning here, and writes something of its own before the answer
            return answer if other is None and cut else start
        rest = self.text[answer:]
        closing = other[other.rindex(word) + len(word) :]
        if not closing.endswith(rest):
            raise self._uncertain(turn, "where the reasoning ends")
        closing = closing[: len(closing) - len(rest)]
        mark = _CLOSING.match(closing)
        before_answer = closing[mark.end() :] if mark else ""
        if before_answer.endswith(lead):
            return start
        if not lead.endswith(before_answer):
            raise self._uncertain(turn, "where the reasoning ends")
        return answer - len(before_answer)

    def _thinking_end(self, message: Message) -> int:
        return thinking_end(message["content"] or "", opened="</think>" in self._style.template)

    def _start_of_answer(self, turn: int, start: int, end: int) -> int:
        """Index of the first character of a turn's content without reasoning; of its calls or its end without it."""
        message = self._messages[turn]
        cut, content = self._thinking_end(message), message["content"] or ""
        if not content[cut:].strip():
            if message.get("tool_calls"):
                return self._start_of_calls(turn, start, end)
            stops = [name.start for name in self.names if start <= name.start and name.end == end]
            return stops[-1] if stops else end
        other = self._render_if_accepted(self._with_content(turn, content[:cut] + next(self._unused)))
        answer = -1 if other is None else common_prefix(self.text, other)
        if not start <= answer < end:
            raise self._uncertain(turn, "where the answer begins")
        return answer

    def _start_of_calls(self, turn: int, start: int, end: int) -> int:
        """Index of the first character of a turn's calls, with what marks them."""
        message = self._messages[turn]
        calls = replace_content(message["tool_calls"], next(self._unused))
        replaced = self._render_if_accepted(self._with_message(turn, {**message, "tool_calls": calls}))
        most = end if replaced is None else min(common_prefix(self.text, replaced), end)
        without = {key: value for key, value in message.items() if key != "tool_calls"}
        without["content"] = without["content"] or ""
        # a template may write reasoning in the content in another way
        content = without["content"][self._thinking_end(without) :].strip()
        # a template may refuse the tool's answers without the calls
        for messages in (self._with_message(turn, without), [*self._messages[:turn], without]):
            other = self._render_if_accepted(messages)
            if other is None:
                continue
            border = common_prefix(self.text, other)
            names = [*self.names, *names_in(other, self._style.special_tokens)]
            border = min([border, *(name.start for name in names if name.start < border < name.end)])
            border = max(border, start)
            while border < end and self.text[border].isspace():
                border += 1
            if border <= most and content in self.text[start:border]:
                return border
        raise self._uncertain(turn, "where the calls begin")

    def _with_content(self, turn: int, content: str) -> list[Message]:
        return self._with_message(turn, {**self._messages[turn], "content": content})

    def _uncertain(self, turn: int, what: str) -> RecordError:
        return RecordError(
            "template_mismatch",
            f"{shown_format(self._style.name)}: it cannot be told {what} in turn {turn}, which --supervise asks for; "
            "use --supervise all, or another template",
        )
