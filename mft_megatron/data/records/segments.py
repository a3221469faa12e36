"""A sample's text in segments, each supervised or not, and what all formats share about them.

Segments are tokenised one by one, so that the loss mask is exact by construction: no token straddles a border.
"""

from typing import NamedTuple

from .conversation import Conversation, RecordError, Turn

SUPERVISE = ("all", "last")
# names under which a turn carries reasoning beside its content
REASONING = ("reasoning_content", "reasoning", "thinking")


class Segment(NamedTuple):
    """``special``: the text is the name of one token of the vocabulary, not text to be cut.

    ``markup``: names of special tokens in the text stand for those tokens. Only the prompt of raw text is markup, so
    that it may be written for filling in the middle; elsewhere they are text like any other, so that what a turn,
    a completion or a document says can never end it.
    """

    text: str
    supervised: bool
    special: bool = False
    markup: bool = False


def has_reasoning(turn: Turn) -> bool:
    """Whether a turn carries reasoning beside its content."""
    return bool(turn.extra) and any(turn.extra.get(name) for name in REASONING)


def refuse_reasoning(conversation: Conversation, why: str) -> None:
    """Refuse a chat with reasoning that its format would lose; ``why`` follows "reasoning of its own".

    Raises:
        RecordError: a turn has some.
    """
    for number, turn in enumerate(conversation.turns):
        if has_reasoning(turn):
            raise RecordError("reasoning_has_no_place", f"turn {number} has reasoning of its own, {why}")


def supervised_turns(conversation: Conversation, supervise: str) -> list[bool]:
    """Which turns of a chat are supervised.

    Args:
        conversation: not raw.
        supervise: of :data:`SUPERVISE`: every assistant turn, or only the last; a turn with ``learn=False`` never is.

    Raises:
        RecordError: no turn is, or what all of those say is empty.
    """
    supervised = [turn.learn and turn.role == "assistant" for turn in conversation.turns]
    if supervise == "last":
        answers = [number for number, turn in enumerate(conversation.turns) if turn.role == "assistant"]
        supervised = [learn and number == answers[-1] for number, learn in enumerate(supervised)]
    if True not in supervised:
        raise RecordError(
            "nothing_to_learn",
            "no turn is supervised: " + ("the last" if supervise == "last" else "every") + " assistant turn is marked "
            "as not to be learned, or there is none",
        )
    if not any(_says_something(turn) for turn, learn in zip(conversation.turns, supervised, strict=True) if learn):
        raise _empty_answer()
    return supervised


def _says_something(turn: Turn) -> bool:
    return bool((turn.content and not turn.content.isspace()) or turn.tool_calls or has_reasoning(turn))


def _empty_answer() -> RecordError:
    return RecordError("empty_answer", "all that is to be learned is empty, so only to stop at once would be learned")


def raw_segments(conversation: Conversation, end_of_text: str) -> list[Segment]:
    """Raw text: the turns as they are, then the end-of-text token. Completions and that token are supervised, and
    prompts are markup.

    Raises:
        RecordError: the completion is not to be learned, or empty.
    """
    supervised = [turn.role == "completion" and turn.learn for turn in conversation.turns]
    if True not in supervised:
        raise RecordError("nothing_to_learn", "the completion is marked as not to be learned, so nothing is supervised")
    if not any(turn.content for turn, learn in zip(conversation.turns, supervised, strict=True) if learn):
        raise _empty_answer()
    segments = [
        Segment(turn.content, learn, False, turn.role == "prompt")
        for turn, learn in zip(conversation.turns, supervised, strict=True)
    ]
    segments.append(Segment(end_of_text, supervised[-1], True))
    return segments
