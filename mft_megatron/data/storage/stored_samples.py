"""The stored samples of a data set: their lengths, tasks and counts without reading a token, and their contents."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mft_megatron.data.sample_slices import supervised_tokens

from .arrays import load_task_ids
from .indexed_dataset import IndexedDataset
from .ledger import Ledger, TaskEntry
from .weights import StoredWeights, read_stored_weights

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
        weights: of samples and tokens; ``None`` where all are 1.
    """

    tasks: Sequence[TaskEntry]
    lengths: np.ndarray
    supervised: np.ndarray
    task_ids: np.ndarray
    mask: IndexedDataset
    weights: StoredWeights | None = None


def read_stored_samples(prefix: str | Path, ledger: Ledger) -> StoredSamples:
    """Read lengths, tasks and counts of a data set's samples; memory holds one block of masks at a time.

    Raises:
        InputError: a file is missing or damaged.
    """
    mask = IndexedDataset(f"{prefix}_loss_mask")
    blocks = [
        supervised_tokens(*mask.read(first, first + SAMPLES_AT_ONCE)) for first in range(0, len(mask), SAMPLES_AT_ONCE)
    ]
    supervised = np.concatenate([np.zeros(0, np.int64), *blocks])
    return StoredSamples(
        tasks=ledger.tasks,
        lengths=np.array(mask.lengths),
        supervised=supervised,
        task_ids=load_task_ids(prefix),
        mask=mask,
        weights=read_stored_weights(prefix, ledger.arrays, supervised),
    )
