"""Slices of samples, which rows are made of: a whole sample, or a part of one that is longer than a row."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# tokens whose supervised ones are counted at a time
_TOKENS_AT_ONCE = 1 << 18


class SampleSlices(NamedTuple):
    """P slices of samples as parallel arrays.

    Attributes:
        samples: int64 [P], index of the sample.
        starts: int64 [P], index of the first token within the sample.
        lengths: int64 [P], number of tokens.
    """

    samples: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def take(self, indices: np.ndarray | slice) -> "SampleSlices":
        """Select slices by their indices, in the order of ``indices`` (int64 or bool, or a ``slice``)."""
        return SampleSlices(*(values[indices] for values in self))

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all slices."""
        return int(self.lengths.sum())


NO_SLICES = SampleSlices(*(np.zeros(0, np.int64) for _ in SampleSlices._fields))


def concatenate_slices(parts: Sequence[SampleSlices]) -> SampleSlices:
    """Concatenate slices in the order of ``parts``."""
    return SampleSlices(*map(np.concatenate, zip(*parts, strict=True))) if parts else NO_SLICES


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate the ranges ``start, start + 1, …, start + length - 1``.

    Args:
        starts: int64 [N].
        lengths: int64 [N], none negative.

    Returns:
        int64 [sum of lengths].
    """
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def supervised_tokens(mask: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Number of supervised targets in each sample or slice: its first token is none, because nothing predicts it.

    Args:
        mask: uint8 [tokens] of all samples concatenated; 1 where a token is supervised.
        lengths: int [N], tokens of each sample; 0 is allowed.

    Returns:
        int64 [N].
    """
    targets, some = np.zeros(len(lengths), np.int64), lengths > 0
    ends = np.cumsum(lengths[some], dtype=np.int64)
    starts = ends - lengths[some]
    counts = np.empty(len(starts), np.int64)
    first = 0
    while first < len(starts):  # in blocks, because reduceat copies what it sums up as int64
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + _TOKENS_AT_ONCE, "right")))
        block = mask[starts[first] : ends[last - 1]]
        if last == first + 1:
            counts[first] = np.count_nonzero(block)
        else:
            counts[first:last] = np.add.reduceat(block, starts[first:last] - starts[first], dtype=np.int64)
        first = last
    targets[some] = counts - mask[starts]
    return targets


def weight_sums(weights: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sum of the weights of the targets of each sample or slice, added one by one in their order.

    Args:
        weights: float32 [tokens] of all samples concatenated; 0 where a token is not supervised.
        lengths: int [N], tokens of each sample; 0 is allowed.

    Returns:
        float64 [N].
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    targets = weights.astype(np.float64)
    targets[(ends - lengths)[lengths > 0]] = 0  # nothing predicts the first token
    return np.bincount(np.repeat(np.arange(len(lengths)), lengths), targets, len(lengths))
