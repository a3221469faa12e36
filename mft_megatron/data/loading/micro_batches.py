"""The micro-batches of one data-parallel rank: its rows, their widths, and the count of what was used.

::

    StepPlan ─► rows of this rank ─► iterate: Batch of numpy arrays, one after another ─► model
                                          └─► how many were used ─► UsageByEpoch
"""

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

from mft_megatron.batch import Batch, Ranks, StepPlan
from mft_megatron.data.sample_slices import SampleSlices, concatenate_slices

from .dataset import PackedDataset, PackedSplit, rows_of
from .step_plan import shard_plan
from .usage import Usage
from .validation_sampling import shard_rows

# the sample slices of each row
Rows: TypeAlias = Sequence[SampleSlices]


class UsageByEpoch:
    """What a rank has put into micro-batches so far, by epoch of the stream of packs."""

    def __init__(self, num_tasks: int):
        self._num_tasks = num_tasks
        self._epochs: dict[int, Usage] = {}

    def add(self, rows: Rows, epochs: np.ndarray, task_ids: np.ndarray) -> None:
        """Count rows that were used.

        Args:
            rows: the slices of each row.
            epochs: int64 [rows], the epoch each is used for.
            task_ids: uint16, task of every sample of the data set.
        """
        slices = concatenate_slices(rows)
        epoch = np.repeat(epochs, [len(row.samples) for row in rows])
        tasks = np.asarray(task_ids[slices.samples])
        for number in np.unique(epoch).tolist():
            own = epoch == number
            self._epochs[number] = self.of(number) + Usage.of(slices.take(own), tasks[own], self._num_tasks)

    def of(self, epoch: int) -> Usage:
        return self._epochs.get(epoch, Usage.none(self._num_tasks))

    def forget(self, epoch: int) -> None:
        """An epoch is over."""
        self._epochs.pop(epoch, None)


class MicroBatches:
    """The micro-batches of one rank, to be iterated over once.

    ``num_used``: how many of them iteration has given out so far.
    """

    def __init__(self, dataset: PackedDataset, rows: Sequence[Rows], epochs: np.ndarray, width_multiple: int):
        """
        Args:
            dataset: where the samples are.
            rows: the rows of each micro-batch, which have the same number of rows.
            epochs: int64 [micro-batches, rows], the epoch each row is used for.
            width_multiple: a micro-batch of a padded data set is as wide as a multiple of this many tokens.
        """
        self._dataset = dataset
        self._rows = rows
        self._epochs = epochs
        self._width_multiple = width_multiple
        self.num_used = 0

    @classmethod
    def of_plan(
        cls, split: PackedSplit, plan: StepPlan, ranks: Ranks, micro_batch_size: int, width_multiple: int
    ) -> "MicroBatches":
        """The micro-batches of a rank in a step.

        Args:
            split: that the plan is of.
            plan: of the step.
            ranks: which rank of how many.
            micro_batch_size: rows of a micro-batch.
            width_multiple: see :meth:`__init__`.
        """
        places = shard_plan(plan, ranks, micro_batch_size, split.dataset.padded)
        rows = [[split.slices_of(pack) for pack in packs_B] for packs_B in plan.packs_G[places]]
        return cls(split.dataset, rows, plan.epochs_G[places], width_multiple)

    @classmethod
    def of_rows(
        cls,
        dataset: PackedDataset,
        rows: Rows,
        ranks: Ranks,
        micro_batch_size: int,
        batch_multiple: int,
        width_multiple: int,
    ) -> "MicroBatches":
        """The micro-batches of a rank in a draw.

        Args:
            dataset: where the samples are.
            rows: of all ranks.
            ranks: which rank of how many.
            micro_batch_size: rows of a micro-batch.
            batch_multiple: empty rows are added up to a multiple of this many.
            width_multiple: see :meth:`__init__`.
        """
        own = shard_rows(list(rows), ranks, micro_batch_size, batch_multiple)
        return cls(dataset, own, np.zeros((len(own), micro_batch_size), np.int64), width_multiple)

    @property
    def padded(self) -> bool:
        """Whether micro-batches differ in width."""
        return self._dataset.padded

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Batch[np.ndarray]]:
        for rows in self._rows:
            self.num_used += 1
            yield rows_of(self._dataset, rows, self._width(rows))

    def skip(self) -> None:
        """Count all of them as used without making them."""
        self.num_used = len(self._rows)

    def add_used_to(self, usage: UsageByEpoch) -> None:
        """Add the micro-batches that were used to the counts of a run."""
        rows = [row for rows in self._rows[: self.num_used] for row in rows]
        usage.add(rows, self._epochs[: self.num_used].ravel(), self._dataset.task_ids)

    def _width(self, rows: Rows) -> int:
        """Positions of a row: the sequence length, or in a padded data set no more than the longest row needs."""
        if not self._dataset.padded:
            return self._dataset.seq_length
        longest, multiple = max(row.num_tokens for row in rows), self._width_multiple
        return min(max(-(-longest // multiple), 1) * multiple, self._dataset.seq_length)
