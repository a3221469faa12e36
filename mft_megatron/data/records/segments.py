"""Segments, the parts of a sample's text that are supervised or not, and the rules that all chat formats share.

Segments are tokenised one by one, so the loss mask is exact by construction: no token crosses a segment border.
"""

from typing import NamedTuple

from .conversation import Conversation, RecordError, Turn
from .notes import RecordNotes

SUPERVISE = ("all", "last")
# keys of a turn that hold reasoning beside its content
REASONING = ("reasoning_content", "reasoning", "thinking")


class Segment(NamedTuple):
    """A part of a sample's text.

    Attributes:
        text: to be tokenised.
        supervised: whether its tokens count in the loss.
        special: the text is the name of one token of the vocabulary.
        markup: names of special tokens in the text become those tokens. Only the prompt of raw text is markup, so that
            it can be written for fill-in-the-middle. Elsewhere names of tokens are ordinary text, so no turn,
            completion or document can end itself.
        begins: the sample begins here as the tokenizer's own ``encode`` begins a text, possibly with BOS and a space.
    """

    text: str
    supervised: bool
    special: bool = False
    markup: bool = False
    begins: bool = False


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


def supervised_turns(
    conversation: Conversation, supervise: str, notes: RecordNotes | None = None, learn_empty: bool = False
) -> list[bool]:
    """Choose the turns of a chat that are supervised.

    Args:
        conversation: a chat, not raw text.
        supervise: of :data:`SUPERVISE`: every assistant turn, or only the last; never a turn with ``learn=False``.
        notes: counts that empty answers beside others are added to, which are not supervised.
        learn_empty: empty answers are supervised like others.

    Returns:
        whether each turn is supervised.

    Raises:
        RecordError: no turn is supervised, or all of them are empty.
    """
    supervised = [turn.learn and turn.role == "assistant" for turn in conversation.turns]
    if supervise == "last":
        answers = [index for index, turn in enumerate(conversation.turns) if turn.role == "assistant"]
        supervised = [learn and index == answers[-1] for index, learn in enumerate(supervised)]
    if True not in supervised:
        raise RecordError(
            "nothing_to_learn",
            "no turn is supervised: "
            + ("the last" if supervise == "last" else "every")
            + " assistant turn is excluded "
            "from training, or there is none",
        )
    if learn_empty:
        return supervised
    turns = conversation.turns
    empty = [index for index, learn in enumerate(supervised) if learn and not _says_something(turns[index])]
    if empty:
        if len(empty) == sum(supervised):
            raise _empty_answer()
        for index in empty:
            supervised[index] = False
        if notes is not None:
            notes.kinds["empty_answer_not_learnt"] += len(empty)
    return supervised


def _says_something(turn: Turn) -> bool:
    return bool((turn.content and not turn.content.isspace()) or turn.tool_calls or has_reasoning(turn))


def _empty_answer() -> RecordError:
    return RecordError(
        "empty_answer",
        "every supervised answer is empty, so the model would only learn to stop at once; --learn-empty-answers learns "
        "even that",
    )


def raw_segments(conversation: Conversation, end_of_text: str, learn_empty: bool = False) -> list[Segment]:
    """Write raw text: the turns unchanged, then the end-of-text token.

    Completions and the end-of-text token are supervised; prompts are markup. The first turn that is not empty begins as
    the tokenizer's own ``encode`` does, because a server encodes a raw prompt with it.

    Args:
        conversation: raw text.
        end_of_text: name of the end-of-text token.
        learn_empty: the completion after a prompt may be empty.

    Raises:
        RecordError: the completion is excluded from training or empty.
    """
    supervised = [turn.role == "completion" and turn.learn for turn in conversation.turns]
    if True not in supervised:
        raise RecordError("nothing_to_learn", "the completion is excluded from training, so nothing is supervised")
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
