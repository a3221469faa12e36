"""Packing the slices of one split: which of them share a row, and what each row counts.

Files of a split, for sequence length L: ``_{split}_packs_{L}.npy`` int64, sample numbers, pack after pack;
``_{split}_packs_{L}_offsets.npy`` int64 [packs + 1], where each pack starts in it; ``_{split}_counts_{L}.npy`` int64
[4, rows]: pack, task, supervised tokens and samples that have any, by pack and task, for tasks that occur in the pack.
Where not every slice is a whole sample, ``_{split}_packs_{L}_cuts.npy`` int64 [2, slices] has first token and length of
each.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mft_megatron.data import _sample_index
from mft_megatron.data.sample_slices import SampleSlices, ranges

SPLITS = ("train", "valid", "test")
PADDING_MODES = ("pack", "padding", "concat")


@dataclasses.dataclass(frozen=True)
class SplitPacks:
    """The rows of a split: ``slices``, pack after pack, ``offsets`` int64 [packs + 1], ``counts`` int64 [4, rows];
    ``whole``: every slice is a whole sample."""

    slices: SampleSlices
    offsets: np.ndarray
    counts: np.ndarray
    whole: bool

    def files(self, split: str, seq_length: int) -> dict[str, np.ndarray]:
        """The arrays by the ends of their files' names."""
        packs, offsets, counts, cuts = pack_files(split, seq_length)
        files = {packs: self.slices.samples, offsets: self.offsets, counts: self.counts}
        if not self.whole:
            files[cuts] = np.stack([self.slices.starts, self.slices.lengths])
        return files


def pack_files(split: str, seq_length: int) -> tuple[str, str, str, str]:
    """Ends of the names of a split's files: packs, offsets, counts, cuts."""
    packs = f"_{split}_packs_{seq_length}"
    return f"{packs}.npy", f"{packs}_offsets.npy", f"_{split}_counts_{seq_length}.npy", f"{packs}_cuts.npy"


def pack_split(
    slices: SampleSlices,
    supervised: np.ndarray,
    tasks: np.ndarray,
    groups: Sequence[np.ndarray],
    seq_length: int,
    padding_mode: str,
    lengths_of_samples: np.ndarray,
) -> SplitPacks:
    """Put slices into rows.

    Args:
        slices: of the split.
        supervised: int64 [slices], targets that count.
        tasks: uint16 [slices].
        groups: places of slices, each group packed for itself; a slice may be in several groups, not twice in one.
        seq_length: tokens of a row.
        padding_mode: "pack": best fit, from the longest slice to the shortest; "padding": a slice is a row; "concat":
            see :func:`concatenate`.
        lengths_of_samples: int [samples], tokens of every sample of the data set.

    Raises:
        ValueError: a slice is longer than a row.
    """
    parts = [_pack_group(slices.lengths[group], seq_length, padding_mode) for group in groups]
    places = np.concatenate([group[order] for group, (order, _) in zip(groups, parts, strict=True)])
    sizes = np.concatenate([np.diff(offsets) for _, offsets in parts])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    counts = _sample_index.count_packs(
        np.ascontiguousarray(places),
        offsets,
        np.ascontiguousarray(tasks, np.uint16),
        np.ascontiguousarray(supervised, np.int64),
    )
    packed = slices.take(places)
    return SplitPacks(packed, offsets, counts, _all_whole(packed, lengths_of_samples))


def _pack_group(lengths: np.ndarray, seq_length: int, padding_mode: str) -> tuple[np.ndarray, np.ndarray]:
    if padding_mode == "padding":
        return np.arange(len(lengths)), np.arange(len(lengths) + 1)
    return _sample_index.best_fit_decreasing(np.ascontiguousarray(lengths, np.int32), seq_length)


def concatenate(
    documents: Sequence[SampleSlices], tasks: Sequence[int], seq_length: int, lengths_of_samples
) -> SplitPacks:
    """Rows that are full whatever the documents' borders: the stream of a task's documents, cut every
    ``seq_length - 1`` tokens.

    A row begins with the last token of the row before it, so that every token but the first of the stream is a target
    once. All tokens are supervised. A row counts as one sample.

    Args:
        documents: whole documents of each task, in the order of its stream.
        tasks: number of each task.
        seq_length: tokens of a row, at least 2.
        lengths_of_samples: int [samples], tokens of every sample of the data set.
    """
    step = seq_length - 1
    slices, sizes, counts, packs = [], [], [], 0
    for task, own in zip(tasks, documents, strict=True):
        ends = np.cumsum(own.lengths)
        total = int(ends[-1])
        row_starts = np.arange(0, max(total - 1, 1), step)
        row_lengths = np.minimum(seq_length, total - row_starts)
        first = np.searchsorted(ends, row_starts, "right")
        number = np.searchsorted(ends, row_starts + row_lengths, "left") - first + 1
        document = ranges(first, number)
        row = np.repeat(np.arange(len(row_starts)), number)
        begin = np.maximum(row_starts[row], ends[document] - own.lengths[document])
        end = np.minimum((row_starts + row_lengths)[row], ends[document])
        slices.append(SampleSlices(own.samples[document], begin - ends[document] + own.lengths[document], end - begin))
        sizes.append(number)
        counts.append(
            np.stack(
                [
                    np.arange(packs, packs + len(row_starts)),
                    np.full(len(row_starts), task),
                    row_lengths - 1,
                    np.minimum(row_lengths - 1, 1),
                ]
            )
        )
        packs += len(row_starts)
    packed = SampleSlices(*map(np.concatenate, zip(*slices, strict=True)))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(sizes))])
    return SplitPacks(packed, offsets, np.concatenate(counts, axis=1), _all_whole(packed, lengths_of_samples))


def _all_whole(slices: SampleSlices, lengths_of_samples: np.ndarray) -> bool:
    return bool(np.array_equal(slices.lengths, lengths_of_samples[slices.samples]))
