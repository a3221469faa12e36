"""Segments, the parts of a sample's text with their weights, and the rules that all chat formats share.

Texts of different weights are tokenised apart, so the loss mask is exact by construction: no token crosses a border. A
part of an answer that ``--supervise`` makes context is tokenised with the rest of it, as where all is supervised.
"""

from typing import NamedTuple

from .conversation import Conversation, RecordError, Turn
from .notes import RecordNotes

SUPERVISE = ("all", "last", "no-thinking", "no-tool-calls", "tool-calls-only")
# those that supervise parts of answers
PARTS = SUPERVISE[2:]
# reason of records of which --supervise leaves nothing to learn; they are counted, and never stop a command
LEFT_OUT = "left_out_by_supervise"
# keys of a turn that hold reasoning beside its content
REASONING = ("reasoning_content", "reasoning", "thinking")


class Segment(NamedTuple):
    """A part of a sample's text.

    Attributes:
        text: to be tokenised.
        weight: of its tokens in the loss; 0 where it is not supervised.
        special: the text is the name of one token of the vocabulary.
        markup: names of special tokens in the text become those tokens. Only the prompt of raw text is markup, so that
            it can be written for fill-in-the-middle. Elsewhere names of tokens are ordinary text, so no turn,
            completion or document can end itself.
        begins: the sample begins here as the tokenizer's own ``encode`` begins a text, possibly with BOS and a space.
        context: it is a part of a supervised answer and not supervised itself.
    """

    text: str
    weight: float
    special: bool = False
    markup: bool = False
    begins: bool = False
    context: bool = False

    @property
    def supervised(self) -> bool:
        """Whether its tokens count in the loss."""
        return self.weight > 0 and not self.context


def has_reasoning(turn: Turn) -> bool:
    """Whether a turn has reasoning beside its content."""
    return bool(turn.extra) and any(turn.extra.get(name) for name in REASONING)


def refuse_reasoning(conversation: Conversation, why: str) -> None:
    """Refuse a chat with reasoning beside the content, which its format would lose.

    Args:
        conversation: a chat.
        why: words that follow "has reasoning beside its content".

    Raises:
        RecordError: a turn has reasoning.
    """
    for index, turn in enumerate(conversation.turns):
        if has_reasoning(turn):
            raise RecordError("reasoning_has_no_place", f"turn {index} has reasoning beside its content, {why}")


def turn_weights(
    conversation: Conversation, supervise: str, notes: RecordNotes | None = None, learn_empty: bool = False
) -> list[float]:
    """Choose the turns of a chat that are supervised.

    Args:
        conversation: a chat, not raw text.
        supervise: of :data:`SUPERVISE`: every assistant turn, or only the last, or every one of which a part is
            supervised; never a turn with ``learn=False``.
        notes: counts that empty answers beside others are added to, which are not supervised.
        learn_empty: empty answers are supervised like others.

    Returns:
        weight of each turn, 0 where it is not supervised.

    Raises:
        RecordError: no turn is supervised, or all of them are empty, or it cannot be told which part is supervised.
    """
    weights = [turn.weight if turn.learn and turn.role == "assistant" else 0.0 for turn in conversation.turns]
    if supervise == "last":
        answers = [index for index, turn in enumerate(conversation.turns) if turn.role == "assistant"]
        weights = [weight if weight and index == answers[-1] else 0.0 for index, weight in enumerate(weights)]
    if not any(weights):
        raise RecordError(
            "nothing_to_learn",
            "no turn is supervised: "
            + ("the last" if supervise == "last" else "every")
            + " assistant turn is excluded "
            "from training, or there is none",
        )
    turns = conversation.turns
    empty = [index for index, weight in enumerate(weights) if weight and not _says_something(turns[index])]
    if empty and not learn_empty:
        if len(empty) == sum(weight > 0 for weight in weights):
            raise _empty_answer()
        for index in empty:
            weights[index] = 0.0
        if notes is not None:
            notes.kinds["empty_answer_not_learnt"] += len(empty)
    return weights if supervise not in PARTS else _with_a_part(conversation, weights, supervise, learn_empty)


def _with_a_part(conversation: Conversation, weights: list[float], supervise: str, learn_empty: bool) -> list[float]:
    """Leave out the turns of which ``supervise``, one of :data:`PARTS`, supervises nothing."""
    turns = conversation.turns
    for index, turn in enumerate(turns):
        if not weights[index]:
            continue
        calls_in_text = not turn.tool_calls and turns[index + 1 : index + 2] and turns[index + 1].role == "tool"
        if supervise != "no-thinking" and calls_in_text:
            raise RecordError(
                "calls_in_text",
                f"turn {index} calls a tool in its text, so --supervise {supervise} cannot tell where; give the calls "
                "as tool_calls",
            )
        said = bool(turn.content[thinking_end(turn.content) :].strip())
        if supervise == "no-thinking":
            kept = said or bool(turn.tool_calls) or (learn_empty and not _says_something(turn))
        elif supervise == "no-tool-calls":
            kept = not turn.tool_calls or bool(turn.content.strip()) or has_reasoning(turn)
        else:
            kept = bool(turn.tool_calls)
        if not kept:
            weights[index] = 0.0
    if not any(weights):
        raise left_out(supervise)
    return weights


def left_out(supervise: str) -> RecordError:
    """Make the error of a record of which ``--supervise`` leaves nothing to learn."""
    return RecordError(LEFT_OUT, f"--supervise {supervise} leaves nothing of it to learn")


def thinking_end(content: str, opened: bool = False) -> int:
    """Index of the first character after the reasoning that an answer begins with; 0 where it begins with none.

    Reasoning is what stands between ``<think>`` and the last ``</think>``, with the line breaks after it; all of the
    content where it is not closed.

    Args:
        content: of the answer.
        opened: ``<think>`` may be missing, because the template writes it into the prompt.
    """
    begins = content.lstrip().startswith("<think>")
    if not (begins or opened):
        return 0
    end = content.rfind("</think>")
    if end < 0:
        return len(content) if begins else 0
    end += len("</think>")
    return end + len(content[end:]) - len(content[end:].lstrip("\n"))


def _says_something(turn: Turn) -> bool:
    return bool((turn.content and not turn.content.isspace()) or turn.tool_calls or has_reasoning(turn))


def _empty_answer() -> RecordError:
    return RecordError(
        "empty_answer",
        "every supervised answer is empty, so the model would only learn to stop at once; --learn-empty-answers learns "
        "even that",
    )


def raw_segments(
    conversation: Conversation, end_of_text: str, learn_empty: bool = False, supervise: str = "all"
) -> list[Segment]:
    """Write raw text: the turns unchanged, then the end-of-text token.

    Completions and the end-of-text token are supervised; prompts are markup. The first turn that is not empty begins as
    the tokenizer's own ``encode`` does, because a server encodes a raw prompt with it.

    Args:
        conversation: raw text.
        end_of_text: name of the end-of-text token.
        learn_empty: the completion after a prompt may be empty.
        supervise: of :data:`SUPERVISE`. Raw text has no calls and no marks of reasoning.

    Raises:
        RecordError: the completion is excluded from training or empty, or begins with reasoning that is not to be
            supervised.
    """
    if supervise == "tool-calls-only":
        raise left_out(supervise)
    supervised = [turn.role == "completion" and turn.learn for turn in conversation.turns]
    if True not in supervised:
        raise RecordError("nothing_to_learn", "the completion is excluded from training, so nothing is supervised")
    if supervise == "no-thinking" and thinking_end(conversation.turns[-1].content):
        raise RecordError(
            "reasoning_has_no_place",
            "the completion begins with <think>, and raw text has no marks of reasoning; give it as a chat, or leave "
            "--supervise no-thinking out",
        )
    learn_empty = learn_empty and not conversation.document
    if not learn_empty and not any(
        turn.content for turn, learn in zip(conversation.turns, supervised, strict=True) if learn
    ):
        raise _empty_answer()
    first = next((index for index, turn in enumerate(conversation.turns) if turn.content), None)
    segments = [
        Segment(turn.content, learn, False, turn.role == "prompt", index == first)
        for index, (turn, learn) in enumerate(zip(conversation.turns, supervised, strict=True))
    ]
    segments.append(Segment(end_of_text, supervised[-1], True))
    return segments
