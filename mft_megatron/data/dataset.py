"""A packed data set on disk, opened in place: rows for the model and counts for the objective.

``P_input_ids`` and ``P_loss_mask`` hold whole samples (:mod:`.indexed_dataset`), ``P_task_ids.npy`` the task of each,
the files of :mod:`.packing` say which samples share a row. Everything is memory-mapped; a row is put together when it
is asked for, without a loop over tokens.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mft_megatron.batch import Batch
from mft_megatron.data.indexed_dataset import IndexedDataset
from mft_megatron.data.ledger import Ledger, file_sha256, ledger_path, read_ledger
from mft_megatron.data.packing import SPLITS, pack_files
from mft_megatron.errors import InputError


def packed_lengths(prefix: str | Path) -> list[int]:
    """Sequence lengths that the data set is packed for."""
    return sorted(int(length) for length in read_ledger(prefix).packs)


class PackedDataset:
    """A data set packed for one sequence length; make it with :meth:`open`."""

    def __init__(self, prefix: str, ledger: Ledger, seq_length: int):
        self.prefix = prefix
        self.ledger = ledger
        self.seq_length = seq_length
        self.tasks: tuple[str, ...] = tuple(task.name for task in ledger.tasks)
        self.dataset_hash = ledger.dataset_hash
        self.vocab_size = ledger.tokenizer.vocab_size
        self.pad_token_id = ledger.tokenizer.pad_token_id
        self.tokens = IndexedDataset(f"{prefix}_input_ids")
        self.mask = IndexedDataset(f"{prefix}_loss_mask")
        self.task_ids = np.load(f"{prefix}_task_ids.npy", mmap_mode="r")
        self._splits = {name: PackedSplit(self, name) for name in ledger.packs[str(seq_length)]}

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
        if str(seq_length) not in ledger.packs:
            known = ", ".join(map(str, packed_lengths(prefix)))
            raise InputError(
                f"--seq-length {seq_length}: {prefix} is packed for {known}; use that, or preprocess with --seq-length "
                f"{seq_length}"
            )
        check_files(prefix, ledger, hashes=check == "hashes")
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


def check_files(prefix: str, ledger: Ledger, hashes: bool) -> None:
    """Compare the files of a data set with its ledger.

    Raises:
        InputError: the first file that is missing or differs in size or, with ``hashes``, in content.
    """
    remedy = "it is not the file the ledger was written for; preprocess the data again"
    for name, entry in ledger.arrays.items():
        path = Path(prefix + name)
        if not path.is_file():
            raise InputError(f"{path}: missing, though {ledger_path(prefix).name} lists it; preprocess the data again")
        if path.stat().st_size != entry.size:
            raise InputError(f"{path}: {path.stat().st_size} bytes, the ledger says {entry.size}; {remedy}")
        if hashes and file_sha256(path) != entry.sha256:
            raise InputError(f"{path}: its content differs from the ledger's sha256; {remedy}")


class PackedSplit:
    """The packs of one split."""

    def __init__(self, dataset: PackedDataset, name: str):
        self.dataset = dataset
        self.name = name
        self.seq_length = dataset.seq_length
        self.num_tasks = len(dataset.tasks)
        files = [dataset.prefix + end for end in pack_files(name, dataset.seq_length)]
        self._samples, self._offsets, self._counts = (np.load(file, mmap_mode="r") for file in files)

    @property
    def num_packs(self) -> int:
        return len(self._offsets) - 1

    def samples_of(self, pack: int) -> np.ndarray:
        """Sample numbers of a pack, int64; none for -1, the empty pack."""
        return self._samples[self._offsets[pack] : self._offsets[pack + 1]] if pack >= 0 else self._samples[:0]

    def counts(self, packs_G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Supervised tokens and samples that have any, of each task over some packs: int64 [K] twice.

        A pack counts as often as it is named; -1 counts nothing.
        """
        packs, task, supervised_tokens, samples = self._counts
        tokens_K, samples_K = np.zeros(self.num_tasks, np.int64), np.zeros(self.num_tasks, np.int64)
        first, last = np.searchsorted(packs, packs_G, "left"), np.searchsorted(packs, packs_G, "right")
        rows = _ranges(first, last - first)
        np.add.at(tokens_K, task[rows], supervised_tokens[rows])
        np.add.at(samples_K, task[rows], samples[rows])
        return tokens_K, samples_K

    def num_tokens(self, packs_G: np.ndarray) -> int:
        """Tokens of all samples in some packs; padding is not counted."""
        return sum(int(self.dataset.tokens.lengths[self.samples_of(pack)].sum()) for pack in packs_G)

    def rows(self, packs_B: np.ndarray) -> Batch:
        """One row for each pack: see :func:`rows_of`."""
        return rows_of(self.dataset, [self.samples_of(pack) for pack in packs_B])


def rows_of(dataset: PackedDataset, samples_of_rows: Sequence[np.ndarray]) -> Batch:
    """Rows of whole samples as numpy arrays: the samples one behind the other, then padding.

    Labels are shifted here and nowhere else: the label of a position is the next token of the same sample, and it
    counts where that token is supervised. The last position of a sample has no label.

    Args:
        dataset: where the samples are.
        samples_of_rows: B arrays of sample numbers; those of one row have no more than ``seq_length`` tokens together.
    """
    tokens, width, num_rows = dataset.tokens, dataset.seq_length, len(samples_of_rows)
    samples = np.concatenate(samples_of_rows)
    lengths = tokens.lengths[samples].astype(np.int64)
    row = np.repeat(np.arange(num_rows), [len(own) for own in samples_of_rows])
    used = np.bincount(row, weights=lengths, minlength=num_rows).astype(np.int64)

    # where each sample starts: in the stream of rows, in the data set, and among the samples' own tokens
    before = np.cumsum(lengths) - lengths
    stream_start = before + row * width - (np.cumsum(used) - used)[row]
    source = _ranges(tokens.starts[samples], lengths)
    target = _ranges(stream_start, lengths)
    last = before + lengths - 1

    own_tokens = tokens.items[source].astype(np.int64)
    own_labels = np.append(own_tokens[1:], 0)
    own_labels[last] = 0
    own_mask = np.append(dataset.mask.items[source][1:], np.uint8(0))
    own_mask[last] = 0
    streams = {
        "tokens_BS": _placed(own_tokens, target, np.full(num_rows * width, dataset.pad_token_id)),
        "labels_BS": _placed(own_labels, target, np.zeros(num_rows * width, np.int64)),
        "loss_mask_BS": _placed(own_mask, target, np.zeros(num_rows * width, np.uint8)),
        "task_ids_BS": _placed(
            np.repeat(dataset.task_ids[samples].astype(np.int64), lengths),
            target,
            np.zeros(num_rows * width, np.int64),
        ),
    }

    # segments: the samples, and what is left of each row
    padding = np.flatnonzero(used < width)
    starts = np.sort(np.concatenate([stream_start, padding * width + used[padding]]))
    cu_seqlens = np.append(starts, num_rows * width)
    segment_lengths = np.diff(cu_seqlens)
    streams["sample_ids_BS"] = np.repeat(np.arange(len(starts)), segment_lengths)
    streams["position_ids_BS"] = np.arange(num_rows * width) - np.repeat(starts, segment_lengths)
    return Batch(
        **{name: stream.reshape(num_rows, width) for name, stream in streams.items()},
        cu_seqlens=cu_seqlens.astype(np.int32),
        max_seqlen=int(segment_lengths.max()),
    )


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, … for every start, ``length`` of them each, one range behind the other."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def _placed(values: np.ndarray, target: np.ndarray, stream: np.ndarray) -> np.ndarray:
    stream[target] = values
    return stream
