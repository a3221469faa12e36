"""A packed data set on disk, opened in place: rows for the model and counts for the objective.

``P_input_ids`` and ``P_loss_mask`` hold whole samples (:mod:`.storage.indexed_dataset`), ``P_task_ids.npy`` the task of
each, the files of :mod:`.packing.packs` say which slices of samples share a row. Everything is memory-mapped; a row is
put together when it is asked for, without a loop over tokens.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mft_megatron.batch import Batch
from mft_megatron.data.packing.packs import SPLITS, pack_files
from mft_megatron.data.sample_slices import NO_SLICES, SampleSlices, concatenate_slices, ranges
from mft_megatron.data.storage.arrays import check_files, load_array, load_task_ids
from mft_megatron.data.storage.indexed_dataset import IndexedDataset
from mft_megatron.data.storage.ledger import Ledger, read_ledger
from mft_megatron.errors import InputError


def packed_lengths(prefix: str | Path) -> list[int]:
    """Sequence lengths that the data set is packed for."""
    return sorted(int(length) for length in read_ledger(prefix).lengths)


class PackedDataset:
    """A data set packed for one sequence length; make it with :meth:`open`."""

    def __init__(self, prefix: str, ledger: Ledger, seq_length: int):
        self.prefix = prefix
        self.ledger = ledger
        self.seq_length = seq_length
        self.tasks: tuple[str, ...] = tuple(task.name for task in ledger.tasks)
        self.entry = ledger.lengths[str(seq_length)]
        self.joined, self.padded = self.entry.joined, self.entry.padded
        self.dataset_hash = ledger.dataset_hash(seq_length)
        self.vocab_size = ledger.tokenizer.vocab_size
        self.pad_token_id = ledger.tokenizer.pad_token_id
        self.tokens = IndexedDataset(f"{prefix}_input_ids")
        self.mask = IndexedDataset(f"{prefix}_loss_mask")
        self.task_ids = load_task_ids(prefix)
        self._splits = {name: PackedSplit(self, name) for name in self.entry.packs}

    @classmethod
    def open(cls, prefix: str | Path, seq_length: int, check: str = "sizes") -> "PackedDataset":
        """Open the data set ``prefix`` as packed for ``seq_length`` tokens.

        Args:
            prefix: the ``--output-prefix`` it was written to.
            seq_length: tokens of a row.
            check: what is compared with the ledger: "sizes" of all files, or "hashes", which reads every byte.

        Raises:
            InputError: no or another ledger, a length it is not packed for, or a file that does not match.
        """
        prefix = str(prefix)
        ledger = read_ledger(prefix)
        if str(seq_length) not in ledger.lengths:
            known = ", ".join(map(str, packed_lengths(prefix)))
            raise InputError(
                f"--seq-length {seq_length}: {prefix} is packed for {known}; use that, or pack it for {seq_length} in "
                f"seconds: tools/pack_data.py --data-path {prefix} --seq-length {seq_length}"
            )
        check_files(prefix, ledger.arrays_for(seq_length), hashes=check == "hashes")
        return cls(prefix, ledger, seq_length)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that have samples, of train, valid and test."""
        return tuple(name for name in SPLITS if name in self._splits)

    def split(self, name: str) -> "PackedSplit":
        """One split.

        Raises:
            InputError: the data set has none of that name.
        """
        if name not in self._splits:
            raise InputError(f"--data-path {self.prefix}: has no {name} split, only {', '.join(self.splits)}")
        return self._splits[name]


class PackedSplit:
    """The packs of one split."""

    def __init__(self, dataset: PackedDataset, name: str):
        self.dataset = dataset
        self.name = name
        self.seq_length = dataset.seq_length
        self.num_tasks = len(dataset.tasks)
        *files, cuts = [dataset.prefix + end for end in pack_files(name, dataset.seq_length)]
        self._samples, self._offsets, self._counts = (
            load_array(file, np.int64, axes) for file, axes in zip(files, (1, 1, 2), strict=True)
        )
        has_cuts = cuts.removeprefix(dataset.prefix) in dataset.ledger.arrays
        self._cuts = load_array(cuts, np.int64, 2) if has_cuts else None

    @property
    def num_packs(self) -> int:
        return len(self._offsets) - 1

    @property
    def num_slices(self) -> int:
        return len(self._samples)

    def slices(self, places: np.ndarray | slice) -> SampleSlices:
        """Slices by their places in the split's files; those of one pack lie one behind the other."""
        samples = np.asarray(self._samples[places])
        if self._cuts is not None:
            return SampleSlices(samples, *np.asarray(self._cuts[:, places]))
        return SampleSlices(samples, np.zeros_like(samples), self.dataset.tokens.lengths[samples].astype(np.int64))

    def slices_of(self, pack: int) -> SampleSlices:
        """The slices of a pack; none for -1, the empty pack."""
        return self.slices(slice(self._offsets[pack], self._offsets[pack + 1])) if pack >= 0 else NO_SLICES

    def slices_of_packs(self, packs: np.ndarray) -> tuple[SampleSlices, np.ndarray]:
        """The slices of some packs one behind the other, and how many each pack has, int64 [packs]; -1 has none."""
        packs = np.asarray(packs, np.int64)
        real = np.maximum(packs, 0)
        first = self._offsets[real]
        number = np.where(packs >= 0, self._offsets[real + 1] - first, 0)
        return self.slices(ranges(first, number)), number

    def counts(self, packs_G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Supervised tokens and samples that have any, of each task over some packs: int64 [K] twice.

        A pack counts as often as it is named; -1 counts nothing.
        """
        packs, task, supervised_tokens, samples = self._counts
        tokens_K, samples_K = np.zeros(self.num_tasks, np.int64), np.zeros(self.num_tasks, np.int64)
        first, last = np.searchsorted(packs, packs_G, "left"), np.searchsorted(packs, packs_G, "right")
        rows = ranges(first, last - first)
        np.add.at(tokens_K, task[rows], supervised_tokens[rows])
        np.add.at(samples_K, task[rows], samples[rows])
        return tokens_K, samples_K

    def num_tokens(self, packs_G: np.ndarray) -> int:
        """Tokens of all samples in some packs; padding is not counted."""
        return self.slices_of_packs(packs_G)[0].num_tokens

    def rows(self, packs_B: np.ndarray) -> Batch[np.ndarray]:
        """One row for each pack: see :func:`rows_of`."""
        return rows_of(self.dataset, [self.slices_of(pack) for pack in packs_B])


def rows_of(
    dataset: PackedDataset, slices_of_rows: Sequence[SampleSlices], width: int | None = None
) -> Batch[np.ndarray]:
    """Rows of slices as numpy arrays: the slices one behind the other, then padding.

    Labels are shifted here and nowhere else: the label of a position is the next token of the same segment, and it
    counts where that token is supervised. The last position of a segment has no label. A slice is a segment; in a
    joined data set all slices of a row are one.

    Args:
        dataset: where the samples are.
        slices_of_rows: B times the slices of a row, which have no more than ``width`` tokens together.
        width: positions of a row; the data set's sequence length where it is not given.
    """
    tokens, num_rows = dataset.tokens, len(slices_of_rows)
    width = dataset.seq_length if width is None else width
    slices = concatenate_slices(slices_of_rows)
    row = np.repeat(np.arange(num_rows), [len(own.samples) for own in slices_of_rows])
    used = np.bincount(row, weights=slices.lengths, minlength=num_rows).astype(np.int64)

    # where each slice lies: in the stream of rows, and in the data set
    before = np.cumsum(slices.lengths) - slices.lengths
    stream_start = before + row * width - (np.cumsum(used) - used)[row]
    source = ranges(tokens.start_of(slices.samples) + slices.starts, slices.lengths)
    target = ranges(stream_start, slices.lengths)
    # where segments begin in the stream, and end among the slices' own tokens
    filled = np.flatnonzero(used)
    segment_start = filled * width if dataset.joined else stream_start
    last = np.cumsum(used[filled] if dataset.joined else slices.lengths) - 1

    own_tokens = tokens.items[source].astype(np.int64)
    own_labels = np.append(own_tokens[1:], 0)
    own_labels[last] = 0
    own_mask = np.append(dataset.mask.items[source][1:], np.uint8(0))
    own_mask[last] = 0
    own_tasks = np.repeat(dataset.task_ids[slices.samples].astype(np.int64), slices.lengths)
    positions = num_rows * width
    streams = {
        "tokens_BS": _placed(own_tokens, target, np.full(positions, dataset.pad_token_id)),
        "labels_BS": _placed(own_labels, target, np.zeros(positions, np.int64)),
        "loss_mask_BS": _placed(own_mask, target, np.zeros(positions, np.uint8)),
        "task_ids_BS": _placed(own_tasks, target, np.zeros(positions, np.int64)),
    }

    # segments: the slices, and what is left of each row
    padding = np.flatnonzero(used < width)
    starts = np.sort(np.concatenate([segment_start, padding * width + used[padding]]))
    cu_seqlens = np.append(starts, positions)
    segment_lengths = np.diff(cu_seqlens)
    streams["sample_ids_BS"] = np.repeat(np.arange(len(starts)), segment_lengths)
    streams["position_ids_BS"] = np.arange(positions) - np.repeat(starts, segment_lengths)
    return Batch(
        **{name: stream.reshape(num_rows, width) for name, stream in streams.items()},
        cu_seqlens=cu_seqlens.astype(np.int32),
        max_seqlen=int(segment_lengths.max()),
        lengths_B=used,
    )


def _placed(values: np.ndarray, target: np.ndarray, stream: np.ndarray) -> np.ndarray:
    stream[target] = values
    return stream
