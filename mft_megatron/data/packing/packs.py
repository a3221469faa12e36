"""Packing the slices of one split: which slices share a pack, and the counts of each pack.

Files of a split, for sequence length L:

- ``_{split}_packs_{L}.npy`` int64 [slices], index of the sample of each slice, pack after pack;
- ``_{split}_packs_{L}_offsets.npy`` int64 [packs + 1], index of the first slice of each pack, then their number;
- ``_{split}_counts_{L}.npy`` int64 [4, entries]: pack, task, supervised tokens, and samples that have any; one entry
  for each task of a pack, by pack, then task;
- ``_{split}_weights_{L}.npy`` float64 [2, entries], beside the counts: for each entry the sum over its targets of
  sample's times turn's weight, and the sum of the weights of its samples; only where some weight is not 1;
- ``_{split}_packs_{L}_cuts.npy`` int64 [2, slices], first token and length of each slice; only where not every slice is
  a whole sample.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mft_megatron.data import _sample_index
from mft_megatron.data.sample_slices import SampleSlices, concatenate_slices, ranges


@dataclasses.dataclass(frozen=True)
class SplitPacks:
    """The packs of a split.

    Attributes:
        slices: pack after pack.
        offsets: int64 [packs + 1], index of the first slice of each pack, then their number.
        counts: int64 [4, entries], as in the file.
        whole: every slice is a whole sample.
        weights: float64 [2, entries], as in the file; ``None`` where all weights are 1.
    """

    slices: SampleSlices
    offsets: np.ndarray
    counts: np.ndarray
    whole: bool
    weights: np.ndarray | None = None

    def files(self, split: str, seq_length: int) -> dict[str, np.ndarray]:
        """The arrays to be stored, by the suffix of their file's name."""
        packs, offsets, counts, cuts, weights = pack_files(split, seq_length)
        files = {packs: self.slices.samples, offsets: self.offsets, counts: self.counts}
        if not self.whole:
            files[cuts] = np.stack([self.slices.starts, self.slices.lengths])
        if self.weights is not None:
            files[weights] = self.weights
        return files


def pack_files(split: str, seq_length: int) -> tuple[str, str, str, str, str]:
    """Suffixes of the names of a split's files: packs, offsets, counts, cuts, weights."""
    packs, counts, weights = (f"_{split}_{what}_{seq_length}" for what in ("packs", "counts", "weights"))
    return f"{packs}.npy", f"{packs}_offsets.npy", f"{counts}.npy", f"{packs}_cuts.npy", f"{weights}.npy"


def pack_split(
    slices: SampleSlices,
    supervised: np.ndarray,
    tasks: np.ndarray,
    groups: Sequence[np.ndarray],
    seq_length: int,
    padding_mode: str,
    lengths_of_samples: np.ndarray,
    weights: np.ndarray | None = None,
    mixing_seeds: Sequence[int] | None = None,
) -> SplitPacks:
    """Distribute the slices of a split over packs.

    Args:
        slices: of the split.
        supervised: int64 [slices], supervised targets.
        tasks: uint16 [slices].
        groups: int64 indices of slices, at least one group; each group is packed separately. A slice may be in several
            groups, but only once in each.
        seq_length: tokens of a pack.
        padding_mode: "pack": best fit; "padding": each slice is a pack.
        lengths_of_samples: int [samples], tokens of every sample of the data set.
        weights: float64 [2, slices], sums of each slice as in the file; ``None`` where all weights are 1.
        mixing_seeds: of best fit that spreads the slices of each task evenly over a group's packs, a seed for each
            group; ``None`` for best fit from the longest slice to the shortest.

    Raises:
        ValueError: a slice is longer than a pack.
    """
    seeds = [None] * len(groups) if mixing_seeds is None else mixing_seeds
    packed_groups = [
        _pack_group(slices.lengths[group], tasks[group], seq_length, padding_mode, seed)
        for group, seed in zip(groups, seeds, strict=True)
    ]
    indices = np.concatenate([group[order] for group, (order, _) in zip(groups, packed_groups, strict=True)])
    sizes = np.concatenate([np.diff(offsets) for _, offsets in packed_groups])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    counts = _sample_index.count_packs(
        np.ascontiguousarray(indices),
        offsets,
        np.ascontiguousarray(tasks, np.uint16),
        np.ascontiguousarray(supervised, np.int64),
    )
    packed = slices.take(indices)
    sums = None if weights is None else _weights_of_entries(counts, offsets, tasks[indices], weights[:, indices])
    return SplitPacks(packed, offsets, counts, _all_whole(packed, lengths_of_samples), sums)


def _weights_of_entries(counts: np.ndarray, offsets: np.ndarray, tasks: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sum the weights of the slices of each entry of ``counts``, one by one in the order of the slices."""
    pack = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    entry = np.searchsorted(counts[0] << 16 | counts[1], pack << 16 | tasks)  # entries are sorted by pack, then task
    return np.stack([np.bincount(entry, row, counts.shape[1]) for row in weights])


def _pack_group(
    lengths: np.ndarray, tasks: np.ndarray, seq_length: int, padding_mode: str, mixing_seed: int | None
) -> tuple[np.ndarray, np.ndarray]:
    if padding_mode == "padding":
        return np.arange(len(lengths)), np.arange(len(lengths) + 1)
    lengths = np.ascontiguousarray(lengths, np.int32)
    if mixing_seed is None:
        return _sample_index.best_fit_decreasing(lengths, seq_length)
    return _sample_index.best_fit_mixed(lengths, np.ascontiguousarray(tasks, np.int32), seq_length, mixing_seed)


def concatenate_documents(
    documents: Sequence[SampleSlices], tasks: Sequence[int], seq_length: int, lengths_of_samples: np.ndarray
) -> SplitPacks:
    """Cut the concatenated documents of each task into full packs, one every ``seq_length - 1`` tokens.

    A pack begins with the last token of the pack before it, so that every token of the stream but the first is a target
    once. All tokens are supervised. A pack counts as one sample.

    Args:
        documents: whole documents of each task, in the order of its stream; at least one task.
        tasks: index of each task.
        seq_length: tokens of a pack, at least 2.
        lengths_of_samples: int [samples], tokens of every sample of the data set.
    """
    step, num_packs = seq_length - 1, 0
    slices: list[SampleSlices] = []
    sizes: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    for task, of_task in zip(tasks, documents, strict=True):
        ends = np.cumsum(of_task.lengths)
        total = int(ends[-1])
        pack_starts = np.arange(0, max(total - 1, 1), step)
        pack_lengths = np.minimum(seq_length, total - pack_starts)
        first = np.searchsorted(ends, pack_starts, "right")
        size = np.searchsorted(ends, pack_starts + pack_lengths, "left") - first + 1
        document = ranges(first, size)
        pack = np.repeat(np.arange(len(pack_starts)), size)
        begin = np.maximum(pack_starts[pack], ends[document] - of_task.lengths[document])
        end = np.minimum((pack_starts + pack_lengths)[pack], ends[document])
        start_in_document = begin - ends[document] + of_task.lengths[document]
        slices.append(SampleSlices(of_task.samples[document], start_in_document, end - begin))
        sizes.append(size)
        counts.append(
            np.stack(
                [
                    np.arange(num_packs, num_packs + len(pack_starts)),
                    np.full(len(pack_starts), task),
                    pack_lengths - 1,
                    np.minimum(pack_lengths - 1, 1),
                ]
            )
        )
        num_packs += len(pack_starts)
    packed = concatenate_slices(slices)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(sizes))])
    return SplitPacks(packed, offsets, np.concatenate(counts, axis=1), _all_whole(packed, lengths_of_samples))


def _all_whole(slices: SampleSlices, lengths_of_samples: np.ndarray) -> bool:
    return bool(np.array_equal(slices.lengths, lengths_of_samples[slices.samples]))
