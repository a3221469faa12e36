"""Packing one split for one sequence length: which samples share a row, and what each row counts.

Files of a split, for sequence length L: ``_{split}_packs_{L}.npy`` int64, sample numbers, pack after pack;
``_{split}_packs_{L}_offsets.npy`` int64 [packs + 1], where each pack starts in it; ``_{split}_counts_{L}.npy`` int64
[4, rows]: pack, task, supervised tokens and samples that have any, by pack and task, for tasks that occur in the pack.
"""

import dataclasses

import numpy as np

from mft_megatron.data import _sample_index

SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class SplitPacks:
    """The three arrays of a split."""

    sample_numbers: np.ndarray
    offsets: np.ndarray
    counts: np.ndarray

    def files(self, split: str, seq_length: int) -> dict[str, np.ndarray]:
        """The arrays by the ends of their files' names."""
        return dict(zip(pack_files(split, seq_length), dataclasses.astuple(self), strict=True))


def pack_files(split: str, seq_length: int) -> tuple[str, str, str]:
    """Ends of the names of a split's files: packs, offsets, counts."""
    packs = f"_{split}_packs_{seq_length}"
    return f"{packs}.npy", f"{packs}_offsets.npy", f"_{split}_counts_{seq_length}.npy"


def pack_split(
    members: np.ndarray, lengths: np.ndarray, task_ids: np.ndarray, supervised: np.ndarray, seq_length: int
) -> SplitPacks:
    """Pack the samples of a split, best fit first from the longest to the shortest; packs may mix tasks.

    Args:
        members: int64, sample numbers of the split.
        lengths: int32 [samples], tokens of every sample of the data set, at most ``seq_length`` for members.
        task_ids: uint16 [samples].
        supervised: int64 [samples], supervised tokens of every sample.
        seq_length: tokens of a pack.

    Raises:
        ValueError: a member is longer than a pack.
    """
    own = np.ascontiguousarray(lengths[members], np.int32)
    within, offsets = _sample_index.best_fit_decreasing(own, seq_length)
    sample_numbers = np.ascontiguousarray(members[within], np.int64)
    counts = _sample_index.count_packs(
        sample_numbers,
        offsets,
        np.ascontiguousarray(task_ids, np.uint16),
        np.ascontiguousarray(supervised, np.int64),
    )
    return SplitPacks(sample_numbers, offsets, counts)
