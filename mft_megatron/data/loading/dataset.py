"""A packed data set on disk, memory-mapped: the slices and the counts of its packs.

``P_input_ids`` and ``P_loss_mask`` hold whole samples (:mod:`mft_megatron.data.storage.indexed_dataset`),
``P_task_ids.npy`` the task of each, the files of :mod:`mft_megatron.data.storage.weights` their weights; those of
:mod:`mft_megatron.data.packing.packs` define which slices of samples share a pack.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from mft_megatron.batch import TaskCounts
from mft_megatron.data import _sample_index
from mft_megatron.data.packing.packing_options import SPLITS
from mft_megatron.data.packing.packs import pack_files
from mft_megatron.data.sample_slices import NO_SLICES, SampleSlices, ranges
from mft_megatron.data.storage.arrays import check_files, load_array, load_task_ids
from mft_megatron.data.storage.checked_values import refuse_bad_values
from mft_megatron.data.storage.indexed_dataset import IndexedDataset
from mft_megatron.data.storage.ledger import Ledger, LengthEntry, read_ledger
from mft_megatron.data.storage.opened_files import OpenedFiles
from mft_megatron.data.storage.weights import load_sample_weights, load_token_weights
from mft_megatron.errors import InputError

# the sample slices of each row
Rows: TypeAlias = Sequence[SampleSlices]


def packed_lengths(prefix: str | Path) -> list[int]:
    """Sequence lengths that the data set is packed for."""
    return sorted(int(length) for length in read_ledger(prefix).lengths)


def training_packs(prefix: str | Path, seq_length: int) -> int:
    """Number of packs of the training split.

    Raises:
        InputError: there is no ledger, the data set is not packed for this length, or it has no training split.
    """
    entry = _packed_for(read_ledger(prefix), str(prefix), seq_length)
    if "train" not in entry.packs:
        raise InputError(f"--data-path {prefix}: has no train split, only {', '.join(entry.packs)}")
    return entry.packs["train"].packs


def _packed_for(ledger: Ledger, prefix: str, seq_length: int) -> LengthEntry:
    if str(seq_length) not in ledger.lengths:
        known = ", ".join(map(str, sorted(map(int, ledger.lengths))))
        raise InputError(
            f"--seq-length {seq_length}: {prefix} is packed for {known}; use that, or pack it for {seq_length} in "
            f"seconds: tools/pack_data.py --data-path {prefix} --seq-length {seq_length}"
        )
    return ledger.lengths[str(seq_length)]


class PackedDataset:
    """A data set packed for one sequence length; make it with :meth:`open`.

    Attributes:
        prefix: first part of its files' paths.
        files: its files as they were when it was opened.
        ledger: of the data set.
        entry: of this length, in the ledger.
        seq_length: tokens of a pack.
        tasks: names.
        joined: a pack is cut from a stream of documents and is one segment.
        padded: a pack is one slice, and micro-batches are only as wide as necessary.
        dataset_hash: of the data set as packed for this length.
        vocab_size, pad_token_id: of its tokenizer.
        tokens: token ids of all samples.
        mask: loss mask of all samples, uint8.
        task_ids: uint16 [samples], task of each sample.
        sample_weights: float32 [samples]; ``None`` where all are 1.
        token_weights: weights of the turns of all tokens, float32; ``None`` where all are 0 or 1.
    """

    def __init__(self, prefix: str, ledger: Ledger, seq_length: int, files: OpenedFiles | None = None):
        """Map the files of ``prefix`` that belong to ``seq_length``; nothing is compared with the ledger.

        Args:
            prefix: of the data set.
            ledger: of the data set.
            seq_length: tokens of a pack.
            files: as they were before they were compared with the ledger.
        """
        self.prefix = prefix
        self.files = files or OpenedFiles(prefix, ledger.arrays_for(seq_length))
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
        self.sample_weights = load_sample_weights(prefix, ledger.arrays)
        self.token_weights = load_token_weights(prefix, ledger.arrays)
        self._splits = {name: PackedSplit(self, name) for name in self.entry.packs}

    @classmethod
    def open(cls, prefix: str | Path, seq_length: int, check: str = "sizes") -> "PackedDataset":
        """Open the data set ``prefix`` as packed for ``seq_length`` tokens.

        Args:
            prefix: the ``--output-prefix`` it was written to.
            seq_length: tokens of a pack.
            check: what is compared with the ledger: "sizes" of all files, or "hashes", which reads every byte and
                also checks the values.

        Raises:
            InputError: there is no ledger or not one of this format, the data set is not packed for this length, or a
                file does not match.
        """
        prefix = str(prefix)
        ledger = read_ledger(prefix)
        _packed_for(ledger, prefix, seq_length)
        files = OpenedFiles(prefix, ledger.arrays_for(seq_length))
        check_files(prefix, ledger.arrays_for(seq_length), hashes=check == "hashes")
        if check == "hashes":
            refuse_bad_values(prefix, ledger)
            files.keep_blocks()
        return cls(prefix, ledger, seq_length, files)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that have samples, of train, valid and test."""
        return tuple(name for name in SPLITS if name in self._splits)

    def split(self, name: str) -> "PackedSplit":
        """Return one split.

        Raises:
            InputError: the data set has no split of that name.
        """
        if name not in self._splits:
            raise InputError(f"--data-path {self.prefix}: has no {name} split, only {', '.join(self.splits)}")
        return self._splits[name]


class PackEntries(NamedTuple):
    """The tasks of P packs as parallel arrays of E entries, one for each task that occurs in a pack.

    Attributes:
        numbers: int64 [P], entries of each pack.
        tasks_E: int64 [E].
        token_weights_E: fp64 [E], the task's part of the pack in ``T_i``.
        sample_weights_E: fp64 [E], and in ``M_i``.
    """

    numbers: np.ndarray
    tasks_E: np.ndarray
    token_weights_E: np.ndarray
    sample_weights_E: np.ndarray


class PackedSplit:
    """The packs of one split.

    Attributes:
        dataset: the data set.
        name: train, valid or test.
        seq_length: tokens of a pack.
        num_tasks: ``K``.
    """

    def __init__(self, dataset: PackedDataset, name: str):
        """Map the files of the split.

        Raises:
            InputError: a file is damaged.
        """
        self.dataset = dataset
        self.name = name
        self.seq_length = dataset.seq_length
        self.num_tasks = len(dataset.tasks)
        *suffixes, cuts, weights = pack_files(name, dataset.seq_length)
        files = [dataset.prefix + suffix for suffix in suffixes]
        self._samples, self._offsets, self._counts = (
            load_array(file, np.int64, axes) for file, axes in zip(files, (1, 1, 2), strict=True)
        )
        self._cuts, self._weights = (
            load_array(dataset.prefix + suffix, dtype, 2) if suffix in dataset.ledger.arrays else None
            for suffix, dtype in ((cuts, np.int64), (weights, np.float64))
        )

    @property
    def num_packs(self) -> int:
        """Number of packs."""
        return len(self._offsets) - 1

    @property
    def num_slices(self) -> int:
        """Number of sample slices in all packs."""
        return len(self._samples)

    def slices(self, indices: np.ndarray | slice) -> SampleSlices:
        """Slices by their indices in the split's files, int64 or a ``slice``; those of one pack are consecutive."""
        samples = np.asarray(self._samples[indices])
        if self._cuts is not None:
            return SampleSlices(samples, *np.asarray(self._cuts[:, indices]))
        return SampleSlices(samples, np.zeros_like(samples), self.dataset.tokens.lengths[samples].astype(np.int64))

    def slices_of(self, pack: int) -> SampleSlices:
        """Slices of a pack; none for -1, the empty pack."""
        return self.slices(slice(self._offsets[pack], self._offsets[pack + 1])) if pack >= 0 else NO_SLICES

    def packs_of(self, sample: int, token: int) -> list[int]:
        """Find the packs that hold a token of a sample, in a pass over all slices; for messages.

        Args:
            sample: index of the sample.
            token: index within the sample.
        """
        found = np.flatnonzero(np.asarray(self._samples) == sample)
        slices = self.slices(found)
        holds = (slices.starts <= token) & (token < slices.starts + slices.lengths)
        return (np.searchsorted(self._offsets, found[holds], "right") - 1).tolist()

    def slices_of_packs(self, packs_G: np.ndarray) -> tuple[SampleSlices, np.ndarray]:
        """Slices of some packs, concatenated.

        Args:
            packs_G: int [G], indices of packs; -1, the empty pack, has no slices.

        Returns:
            slices: of all these packs.
            counts: int64 [G], number of slices of each pack.
        """
        packs_G = np.asarray(packs_G, np.int64)
        real = np.maximum(packs_G, 0)
        first = self._offsets[real]
        counts = np.where(packs_G >= 0, self._offsets[real + 1] - first, 0)
        return self.slices(ranges(first, counts)), counts

    def counts(self, packs_G: np.ndarray) -> TaskCounts:
        """Count the targets of each task in some packs.

        Args:
            packs_G: int [G], indices of packs; a pack counts as often as it occurs, -1 counts nothing.
        """
        packs = self._counts[0]
        first, last = np.searchsorted(packs, packs_G, "left"), np.searchsorted(packs, packs_G, "right")
        return self._summed(ranges(first, last - first))

    @functools.cached_property
    def totals(self) -> TaskCounts:
        """Counts of the whole split, each pack once: one pass of training."""
        return self._summed(slice(None))

    @functools.cached_property
    def rarest_tasks(self) -> np.ndarray:
        """Task of each pack that the fewest packs have supervised tokens of, int32 [packs]; 2^16 for none."""
        packs, tasks, supervised_tokens, _ = self._counts
        return _sample_index.rarest_tasks(packs, tasks, supervised_tokens, self.num_packs)

    def entries(self, packs: np.ndarray) -> "PackEntries":
        """List the tasks of some packs with their counts, pack by pack.

        Args:
            packs: int64 [P], indices of packs.
        """
        first = self._first_entries[packs]
        numbers = self._first_entries[packs + 1] - first
        entries = ranges(first, numbers)
        _, tasks, supervised_tokens, samples = self._counts
        token_weights, sample_weights = (supervised_tokens, samples) if self._weights is None else self._weights
        return PackEntries(
            numbers,
            tasks[entries],
            token_weights[entries].astype(np.float64),
            sample_weights[entries].astype(np.float64),
        )

    @functools.cached_property
    def _first_entries(self) -> np.ndarray:
        """Index of the first entry of each pack in the counts, int64 [packs + 1]."""
        return np.searchsorted(self._counts[0], np.arange(self.num_packs + 1))

    def _summed(self, entries: np.ndarray | slice) -> TaskCounts:
        _, task, supervised_tokens, samples = self._counts
        tokens_K, samples_K = np.zeros(self.num_tasks, np.int64), np.zeros(self.num_tasks, np.int64)
        np.add.at(tokens_K, task[entries], supervised_tokens[entries])
        np.add.at(samples_K, task[entries], samples[entries])
        if self._weights is None:
            return TaskCounts(tokens_K, samples_K, tokens_K.astype(np.float64), samples_K.astype(np.float64))
        # one by one in the order of the entries, so that the sums have the same bits on every rank
        sums = (np.bincount(task[entries], row[entries], self.num_tasks) for row in self._weights)
        return TaskCounts(tokens_K, samples_K, *sums)

    def num_tokens(self, packs_G: np.ndarray) -> int:
        """Number of tokens in some packs, without padding; ``packs_G`` int [G], indices of packs."""
        return self.slices_of_packs(packs_G)[0].num_tokens
