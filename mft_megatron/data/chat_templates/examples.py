"""Examples: the prompts of a task's first samples as text, kept in the ledger.

A stored sample is ids alone. With the text of its prompt a check before serving can compare what a server makes of the
same text with what the model was trained on.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from mft_megatron.data.records.conversation import Conversation
from mft_megatron.data.records.segments import turn_weights

from .formats import ChatFormat
from .jinja_messages import message_of, strings_in
from .token_names import names_pattern

# only the first samples of a task are looked at, so that parts of it that were made apart have the same examples
FIRST = 32
MOST = 4  # examples of a task; no two of one shape
_CHARACTERS = 6000  # of the JSON text of an example; a longer one is left out
_DOCUMENT = 200  # characters of a document, which has no prompt


def example_of(conversation: Conversation, style: ChatFormat, names: frozenset[str]) -> dict[str, Any] | None:
    """Write the prompt of a sample as an example.

    Args:
        conversation: of the sample.
        style: the format of its task.
        names: special tokens whose names in a turn are text in the sample and tokens to a server, so that a
            conversation with one is no example.

    Returns:
        ``messages`` before the first supervised turn, ``tools``, and ``followed`` where others follow that turn, which
        templates may write differently then; or ``prompt`` of raw text, or ``document``, the beginning of a document;
        ``None`` for one that is too long or has a name.
    """
    example: dict[str, Any]
    if conversation.document:
        example = {"document": conversation.turns[0].content[:_DOCUMENT]}
    elif conversation.raw:
        example = {"prompt": "".join(turn.content for turn in conversation.turns if turn.role == "prompt")}
    else:
        weights = turn_weights(conversation, style.supervise, learn_empty=style.learn_empty_answers)
        first = next(index for index, weight in enumerate(weights) if weight)
        example = {"messages": [message_of(turn) for turn in conversation.turns[:first]]}
        if conversation.tools:
            example["tools"] = list(conversation.tools)
        if first + 1 < len(conversation.turns):
            example["followed"] = True
    too_long = sum(map(len, strings_in(example))) > _CHARACTERS or len(json.dumps(example)) > 2 * _CHARACTERS
    return None if too_long or any(map(names_pattern(tuple(names)).search, strings_in(example))) else example


def first_examples(examples: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Choose the examples that are kept: the first of each shape among the first samples.

    Choosing from parts of a task and then from the chosen ones is choosing from the whole.

    Args:
        examples: in the order of their ``sample``, the index among the samples of the task.
    """
    chosen: dict[str, dict[str, Any]] = {}
    for example in examples:
        if example["sample"] < FIRST and len(chosen) < MOST:
            roles = [message["role"] for message in example.get("messages", ())]
            chosen.setdefault(json.dumps([*sorted(example), roles]), dict(example))
    return list(chosen.values())


def moved(examples: Iterable[Mapping[str, Any]], samples: int) -> list[dict[str, Any]]:
    """Return examples of samples that follow ``samples`` others."""
    return [{**example, "sample": example["sample"] + samples} for example in examples]
