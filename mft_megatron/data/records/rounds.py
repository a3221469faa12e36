"""Splitting a conversation of several rounds with reasoning into one conversation of each round.

A server gives a model the earlier answers without their reasoning, so many templates leave it out of all rounds but the
last. Trained as one sample, earlier answers would lose their reasoning; with a sample of each round every answer keeps
it, after the history that a server writes.
"""

import dataclasses

from .conversation import Conversation, Turn
from .segments import REASONING, has_reasoning

_END = "</think>"  # of reasoning within the content


def split_rounds(conversation: Conversation) -> list[Conversation]:
    """Make a conversation of each round that has a learned answer.

    A round begins with a user's turn. Rounds before the last one of a conversation lose their reasoning and are not
    learned.

    Returns:
        the conversations in the order of the rounds; only ``conversation`` itself where no turn before its last round
        has reasoning.
    """
    turns = conversation.turns
    starts = [index for index, turn in enumerate(turns) if turn.role == "user"]
    if conversation.raw or not starts or not any(map(_reasons, turns[: starts[-1]])):
        return [conversation]
    history = tuple(map(without_reasoning, turns))
    return [
        dataclasses.replace(conversation, turns=(*history[:start], *turns[start:end]))
        for start, end in zip(starts, [*starts[1:], len(turns)], strict=True)
        if any(turn.role == "assistant" and turn.learn for turn in turns[start:end])
    ]


def without_reasoning(turn: Turn) -> Turn:
    """Return a turn as it stands in the history that a server writes: without reasoning, and not learned."""
    if turn.role != "assistant":
        return turn
    content = turn.content.rpartition(_END)[2].lstrip("\n") if _END in turn.content else turn.content
    extra = {key: text for key, text in turn.extra.items() if key not in REASONING}
    return dataclasses.replace(turn, content=content, extra=extra, learn=False)


def _reasons(turn: Turn) -> bool:
    return turn.role == "assistant" and (_END in turn.content or has_reasoning(turn))
