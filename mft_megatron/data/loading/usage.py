"""Proof that an epoch used every slice exactly as often as planned: a count and a 64-bit digest of each task.

Each use of a slice adds a hash of (sample, start) to its task's digest, modulo 2^64. Sums do not depend on an order, so
digests of several ranks add up to that of the epoch for every parallel layout, and a resumed run continues them. A
slice that is lost, doubled or replaced by another one changes its task's digest.
"""

import dataclasses

import numpy as np

from mft_megatron.data.sample_slices import SampleSlices

from .dataset import PackedSplit

# the arrays of so many slices fit in the processor's cache
_BLOCK = 1 << 15


@dataclasses.dataclass(frozen=True, eq=False)
class Usage:
    """Uses of slices by task.

    Attributes:
        slices_K: int64 [K], number of uses.
        digest_K: uint64 [K], sum of :func:`hash64` over the uses.
    """

    slices_K: np.ndarray
    digest_K: np.ndarray

    @classmethod
    def none(cls, num_tasks: int) -> "Usage":
        """No use of any slice; ``num_tasks`` is ``K``."""
        return cls(np.zeros(num_tasks, np.int64), np.zeros(num_tasks, np.uint64))

    @classmethod
    def of(cls, slices: SampleSlices, task_ids: np.ndarray, num_tasks: int) -> "Usage":
        """One use of each of these slices.

        Args:
            slices: P slices.
            task_ids: int [P], task of each slice.
            num_tasks: ``K``.
        """
        digest_K = np.zeros(num_tasks, np.uint64)
        np.add.at(digest_K, task_ids, hash64(slices.samples, slices.starts))
        return cls(np.bincount(task_ids, minlength=num_tasks), digest_K)

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.slices_K + other.slices_K, self.digest_K + other.digest_K)

    def differs_from(self, other: "Usage") -> np.ndarray:
        """Whether the uses of each task differ, bool [K]."""
        return (self.slices_K != other.slices_K) | (self.digest_K != other.digest_K)


def planned_usage(split: PackedSplit) -> Usage:
    """Usage of one whole epoch by the split's index. It takes about a second for ten million slices."""
    total = Usage.none(split.num_tasks)
    task_ids = np.asarray(split.dataset.task_ids)
    for first in range(0, split.num_slices, _BLOCK):
        slices = split.slices(slice(first, min(first + _BLOCK, split.num_slices)))
        total += Usage.of(slices, task_ids[slices.samples], split.num_tasks)
    return total


def hash64(samples: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Hash of each slice: the finalizer of SplitMix64, uint64 [P].

    Different slices have different hashes as long as there are fewer than 2^32 samples.

    Args:
        samples: int64 [P], index of the sample.
        starts: int64 [P], index of the first token within the sample.
    """
    x = samples.astype(np.uint64)
    x <<= np.uint64(32)
    x ^= starts.astype(np.uint64)
    x += np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
