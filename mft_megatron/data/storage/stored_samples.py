"""The stored samples of a data set: their lengths, tasks and counts without reading a token, and their contents."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mft_megatron.data.sample_slices import supervised_tokens

from .arrays import load_task_ids
from .indexed_dataset import IndexedDataset
from .ledger import Ledger, TaskEntry

SAMPLES_AT_ONCE = 1 << 14  # samples of a block that is read at a time


@dataclasses.dataclass(frozen=True)
class StoredSamples:
    """Everything that packing needs to know about the stored samples; samples are in the order of their tasks.

    Attributes:
        tasks: the ledger's entries.
        lengths: int32 [samples], tokens.
        supervised: int64 [samples], supervised targets.
        task_ids: uint16 [samples], index of the task.
        mask: loss masks, uint8; 1 where a token is supervised.
    """

    tasks: Sequence[TaskEntry]
    lengths: np.ndarray
    supervised: np.ndarray
    task_ids: np.ndarray
    mask: IndexedDataset


def read_stored_samples(prefix: str | Path, ledger: Ledger) -> StoredSamples:
    """Read lengths, tasks and counts of a data set's samples; memory holds one block of masks at a time.

    Raises:
        InputError: a file is missing or damaged.
    """
    mask = IndexedDataset(f"{prefix}_loss_mask")
    supervised = [
        supervised_tokens(*read_samples(mask, first, min(first + SAMPLES_AT_ONCE, len(mask))))
        for first in range(0, len(mask), SAMPLES_AT_ONCE)
    ]
    return StoredSamples(
        tasks=ledger.tasks,
        lengths=np.array(mask.lengths),
        supervised=np.concatenate([np.zeros(0, np.int64), *supervised]),
        task_ids=load_task_ids(prefix),
        mask=mask,
    )


def read_samples(dataset: IndexedDataset, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Read the samples ``first`` … ``last - 1``.

    Returns:
        items: of all these samples concatenated, in the dtype of ``dataset``.
        lengths: int32 [samples].
    """
    lengths = np.asarray(dataset.lengths[first:last])
    start = int(dataset.start_of(first))
    return np.asarray(dataset.items[start : start + int(lengths.sum(dtype=np.int64))]), lengths
