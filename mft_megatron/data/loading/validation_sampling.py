"""Stratified draws from the validation split, for the balancers: a little of every task, again and again.

A draw is a pure function of (data set, seed, number of the draw). Every task gives the same number of samples to each
draw and goes through its samples in one named order after another, as the training data do, so that each sample is
drawn equally often. It does not depend on the layout. docs/LOSSES.md §4 has the rule.
"""

import functools

import numpy as np

from mft_megatron.batch import Ranks
from mft_megatron.data import _sample_index
from mft_megatron.data.permutation import named_permutation
from mft_megatron.data.sample_slices import NO_SLICES, SampleSlices, ranges, supervised_tokens

from .dataset import PackedDataset, PackedSplit


class ValidationDraws:
    """Draws of about ``num_packs`` packs from a split.

    ``known_K`` bool [K]: tasks that have samples with supervised tokens; the others are in no draw.
    ``samples_K`` int64 [K]: how many samples each gives to a draw.
    """

    def __init__(self, split: PackedSplit, seed: int, num_packs: int):
        self.dataset = split.dataset
        self._name = f"{split.dataset.dataset_hash}/{split.name}/{seed}/draw"
        self._split = split
        self._units_of_task, lengths = _supervised_units(split)
        # a draw needs one order of each task, or two where one ends
        self._order = functools.lru_cache(maxsize=2 * split.num_tasks)(self._named_permutation)
        self.known_K = np.array([len(units) > 0 for units in self._units_of_task])
        self.samples_K = np.zeros(split.num_tasks, np.int64)
        budget = num_packs * split.seq_length / max(int(self.known_K.sum()), 1)
        for task in np.flatnonzero(self.known_K):
            units = self._units_of_task[task]
            self.samples_K[task] = min(max(int(budget / lengths[units].mean()), 1), len(units))

    def rows(self, number: int) -> list[SampleSlices]:
        """One draw, packed: the slices of each row."""
        units = np.concatenate([self._taken(int(task), number) for task in np.flatnonzero(self.known_K)])
        if self.dataset.joined:
            return [self._split.slices_of(unit) for unit in units]
        slices = self._split.slices(units)
        lengths = np.ascontiguousarray(slices.lengths, np.int32)
        within, offsets = _sample_index.best_fit_decreasing(lengths, self.dataset.seq_length)
        return [slices.take(places) for places in np.split(within, offsets[1:-1])]

    def _taken(self, task: int, number: int) -> np.ndarray:
        units, count = self._units_of_task[task], self.samples_K[task]
        epochs, places = np.divmod(np.arange(number * count, (number + 1) * count), len(units))
        orders = {epoch: self._order(task, int(epoch)) for epoch in np.unique(epochs)}
        return units[[orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)]]

    def _named_permutation(self, task: int, epoch: int) -> np.ndarray:
        return named_permutation(f"{self._name}/{task}/{epoch}", len(self._units_of_task[task]))


def shard_rows(
    rows: list[SampleSlices], ranks: Ranks, micro_batch_size: int, multiple: int
) -> list[list[SampleSlices]]:
    """Rows of one data-parallel rank by micro-batch.

    Args:
        rows: the slices of each row.
        multiple: empty rows are added up to a multiple of this, itself one of ``micro_batch_size · data_size``, so that
            all ranks have the same number of micro-batches.
    """
    rows = rows + [NO_SLICES] * (-len(rows) % multiple)
    first, together = ranks.data_rank * micro_batch_size, ranks.data_size * micro_batch_size
    return [rows[start + first : start + first + micro_batch_size] for start in range(0, len(rows), together)]


def _supervised_units(split: PackedSplit) -> tuple[list[np.ndarray], np.ndarray]:
    """What draws are made of: numbers, by sample, of each task's units that supervise anything, and the lengths of all.

    A unit is a slice, or, where rows are joined, a row.
    """
    slices = split.slices(slice(0, split.num_slices))
    if split.dataset.joined:
        packs = np.arange(split.num_packs)
        first = split.slices_of_packs(packs)[1].cumsum() - split.slices_of_packs(packs)[1]
        lengths = np.add.reduceat(slices.lengths, first)
        targets = lengths - 1
        samples, order = slices.samples[first], packs
    else:
        lengths, samples = slices.lengths, slices.samples
        targets = _targets(split.dataset, slices)
        order = np.lexsort((slices.starts, samples))
    task_ids = np.asarray(split.dataset.task_ids)[samples]
    order = order[targets[order] > 0]
    return [order[task_ids[order] == task] for task in range(split.num_tasks)], lengths


def _targets(dataset: PackedDataset, slices: SampleSlices) -> np.ndarray:
    """Supervised tokens of slices but the first, which is no target; int64. The validation split fits in memory."""
    first = dataset.mask.start_of(slices.samples) + slices.starts
    return supervised_tokens(dataset.mask.items[ranges(first, slices.lengths)], slices.lengths)
