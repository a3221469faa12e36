"""The micro-batches of one data-parallel rank: its rows, their widths, and the count of those that were used.

::

    StepPlan or validation draw ─► rows of this rank ─► iterate: one Batch after another ─► model
                                                                └─► count of used ones ─► UsageByEpoch
"""

from collections.abc import Iterator, Sequence

import numpy as np

from mft_megatron import progress_marks
from mft_megatron.batch import Batch, Ranks, StepPlan
from mft_megatron.data.sample_slices import concatenate_slices
from mft_megatron.data.storage.mapped_files import readable

from .build_batch import build_batch
from .dataset import PackedDataset, PackedSplit, Rows
from .step_plan import shard_plan
from .usage import Usage
from .validation_sampling import shard_rows


class UsageByEpoch:
    """Sample slices that a rank has used so far in training, by epoch of the stream of packs."""

    def __init__(self, num_tasks: int):
        """Start with nothing used; ``num_tasks`` is ``K``."""
        self._num_tasks = num_tasks
        self._epochs: dict[int, Usage] = {}

    def add(self, rows: Rows, epochs: np.ndarray, task_ids: np.ndarray) -> None:
        """Count rows as used.

        Args:
            rows: the slices of each row.
            epochs: int64 [rows], the epoch each is used for.
            task_ids: uint16 [samples], task of every sample of the data set.
        """
        slices = concatenate_slices(rows)
        epoch_of_slice = np.repeat(epochs, [len(row.samples) for row in rows])
        tasks = np.asarray(task_ids[slices.samples])
        for epoch in np.unique(epoch_of_slice).tolist():
            chosen = epoch_of_slice == epoch
            self._epochs[epoch] = self.of(epoch) + Usage.of(slices.take(chosen), tasks[chosen], self._num_tasks)

    def of(self, epoch: int) -> Usage:
        """Usage of one epoch so far."""
        return self._epochs.get(epoch, Usage.none(self._num_tasks))

    def forget(self, epoch: int) -> None:
        """Drop the counts of an epoch that is over."""
        self._epochs.pop(epoch, None)


class MicroBatches:
    """The micro-batches of one rank, to be iterated over once; each is built when it is asked for.

    Attributes:
        num_used: number of micro-batches that iteration has yielded so far.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        rows: Sequence[Rows],
        epochs: np.ndarray,
        width_multiple: int,
        packs: np.ndarray | None = None,
        split: str | None = None,
    ):
        """Take the rows of a rank as they are; see :meth:`of_plan` and :meth:`of_draw`.

        Args:
            dataset: of the samples.
            rows: rows of each micro-batch; all micro-batches have the same number of rows.
            epochs: int64 [micro-batches, rows], the epoch each row is used for.
            width_multiple: in a padded data set the width of a micro-batch is a multiple of this many tokens, or the
                sequence length.
            packs: int64 [micro-batches, rows], for progress marks; ``None`` where rows are no packs.
            split: whose packs they are.
        """
        self._dataset = dataset
        self._packs, self._split = packs, split
        self._rows = rows
        self._epochs = epochs
        self._width_multiple = width_multiple
        self.num_used = 0

    @classmethod
    def of_plan(
        cls, split: PackedSplit, plan: StepPlan, ranks: Ranks, micro_batch_size: int, width_multiple: int
    ) -> "MicroBatches":
        """Make the micro-batches of a rank in one step.

        Args:
            split: the split that the plan was made from.
            plan: of the step.
            ranks: position of the rank.
            micro_batch_size: rows of a micro-batch.
            width_multiple: see :meth:`__init__`.

        Raises:
            ValueError: as :func:`.step_plan.shard_plan`.
            InputError: a file of the data set is no longer the one that was opened, as far as this process sees it.
        """
        split.dataset.files.poll()
        indices = shard_plan(plan, ranks, micro_batch_size, split.dataset.padded)
        rows = [[split.slices_of(pack) for pack in packs_B] for packs_B in plan.packs_G[indices]]
        return cls(split.dataset, rows, plan.epochs_G[indices], width_multiple, plan.packs_G[indices], split.name)

    @classmethod
    def of_draw(
        cls,
        dataset: PackedDataset,
        rows: Rows,
        ranks: Ranks,
        micro_batch_size: int,
        batch_multiple: int,
        width_multiple: int,
    ) -> "MicroBatches":
        """Make the micro-batches of a rank in one validation draw.

        Args:
            dataset: of the samples.
            rows: of the draw, for all ranks.
            ranks: position of the rank.
            micro_batch_size: rows of a micro-batch.
            batch_multiple: empty rows are added up to a multiple of this many; see :func:`.shard_rows`.
            width_multiple: see :meth:`__init__`.
        """
        shard = shard_rows(rows, ranks, micro_batch_size, batch_multiple)
        return cls(dataset, shard, np.zeros((len(shard), micro_batch_size), np.int64), width_multiple)

    @property
    def padded(self) -> bool:
        """Whether micro-batches differ in width."""
        return self._dataset.padded

    @property
    def num_tokens(self) -> list[int]:
        """Number of positions of each micro-batch, with the padding of its rows."""
        return [len(rows) * self._width(rows) for rows in self._rows]

    @property
    def rows(self) -> Sequence[Rows]:
        """Sample slices of each row of each micro-batch."""
        return self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Batch[np.ndarray]]:
        for index, rows in enumerate(self._rows):
            self.num_used += 1
            packs = None if self._packs is None else self._packs[index]
            progress_marks.mark("read", micro_batch=index, split=self._split, packs=packs)
            with readable():
                batch = build_batch(self._dataset, rows, self._width(rows))
            progress_marks.mark("micro-batch", micro_batch=index, split=self._split, packs=packs)
            yield batch

    def skip(self) -> None:
        """Count all micro-batches as used without building them."""
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
