"""Counts of the weights of each task, for the ledger."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .indexed_dataset import IndexedDataset
from .ledger import JsonObject
from .weights import StoredWeights

# samples whose tokens are counted at a time
_AT_ONCE = 1 << 14


class TokenWeights(NamedTuple):
    """Counts of the weights of supervised tokens.

    Attributes:
        others: tokens with a weight other than 1.
        lowest, highest: weights; infinite before the first token.
    """

    others: int = 0
    lowest: float = float("inf")
    highest: float = float("-inf")

    def with_tokens(self, mask: np.ndarray, weights: np.ndarray | None) -> "TokenWeights":
        """Return these counts with more tokens.

        Args:
            mask: uint8 [tokens], 1 where a token is supervised.
            weights: float32 [tokens]; ``None`` where all are 1.
        """
        if not mask.any():
            return self
        supervised = np.ones(1, np.float32) if weights is None else weights[mask == 1]
        return TokenWeights(
            self.others + int(np.count_nonzero(supervised != 1)),
            min(self.lowest, float(supervised.min())),
            max(self.highest, float(supervised.max())),
        )


def count_token_weights(
    mask: IndexedDataset, weights: IndexedDataset | None, task_ids: np.ndarray, num_tasks: int
) -> list[TokenWeights]:
    """Count the weights of the stored tokens of each task.

    Args:
        mask: loss masks of all samples.
        weights: of their tokens; ``None`` where all are 0 or 1.
        task_ids: uint16 [samples], in the order of the tasks.
        num_tasks: ``K``.
    """
    counted = [TokenWeights() for _ in range(num_tasks)]
    borders = np.searchsorted(task_ids, np.arange(num_tasks + 1)).tolist()
    for task in range(num_tasks):
        for first in range(borders[task], borders[task + 1], _AT_ONCE):
            last = min(first + _AT_ONCE, borders[task + 1])
            of_tokens = None if weights is None else weights.read(first, last)[0]
            counted[task] = counted[task].with_tokens(mask.read(first, last)[0], of_tokens)
    return counted


def weights_by_task(
    weights: StoredWeights | None, task_ids: np.ndarray, tokens: Sequence[TokenWeights]
) -> list[JsonObject]:
    """Describe the weights of each task as the ledger does; empty for a task whose weights are all 1.

    Args:
        weights: of all samples; ``None`` where all are 1.
        task_ids: uint16 [samples].
        tokens: counts of each task's tokens.
    """
    if weights is None:
        return [{} for _ in tokens]
    sums = np.bincount(task_ids, weights.samples, len(tokens)).tolist()
    token_sums = np.bincount(task_ids, weights.samples * weights.sums, len(tokens)).tolist()
    described: list[JsonObject] = []
    borders = np.searchsorted(task_ids, np.arange(len(tokens) + 1)).tolist()  # samples are stored task by task
    for task, of_tokens in enumerate(tokens):
        samples = weights.samples[borders[task] : borders[task + 1]]
        others = int(np.count_nonzero(samples != 1))
        if not others and not of_tokens.others:
            described.append({})
            continue
        described.append(
            {
                "samples": {
                    "others": others,
                    "sum": sums[task],
                    "min": float(samples.min()),
                    "max": float(samples.max()),
                },
                "tokens": {
                    "others": of_tokens.others,
                    "sum": token_sums[task],
                    "min": of_tokens.lowest,
                    "max": of_tokens.highest,
                },
            }
        )
    return described
