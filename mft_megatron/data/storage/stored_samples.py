"""What is known of a data set's stored samples without reading a token, and reading them back."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mft_megatron.data.sample_slices import supervised_tokens
from mft_megatron.data.storage.arrays import load_array
from mft_megatron.data.storage.indexed_dataset import IndexedDataset
from mft_megatron.data.storage.ledger import Ledger, TaskEntry


@dataclasses.dataclass(frozen=True)
class StoredSamples:
    """What is known of the stored samples without reading a token. ``lengths`` int32, ``supervised`` int64 and
    ``task_ids`` uint16, by sample; samples are in the order of their tasks."""

    tasks: Sequence[TaskEntry]
    lengths: np.ndarray
    supervised: np.ndarray
    task_ids: np.ndarray
    mask: IndexedDataset


SAMPLES_AT_ONCE = 1 << 14


def read_stored_samples(prefix: str, ledger: Ledger) -> StoredSamples:
    """What is known of a data set's samples, read from its files; of the masks, a part at a time."""
    mask = IndexedDataset(f"{prefix}_loss_mask")
    supervised = [
        supervised_tokens(*read_samples(mask, first, min(first + SAMPLES_AT_ONCE, len(mask))))
        for first in range(0, len(mask), SAMPLES_AT_ONCE)
    ]
    return StoredSamples(
        tasks=ledger.tasks,
        lengths=np.array(mask.lengths),
        supervised=np.concatenate([np.zeros(0, np.int64), *supervised]),
        task_ids=load_array(f"{prefix}_task_ids.npy", np.uint16, 1),
        mask=mask,
    )


def read_samples(dataset: IndexedDataset, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Items and lengths of the samples from ``first`` to before ``last``."""
    lengths = np.asarray(dataset.lengths[first:last])
    start = int(dataset.start_of(first))
    return np.asarray(dataset.items[start : start + int(lengths.sum(dtype=np.int64))]), lengths
