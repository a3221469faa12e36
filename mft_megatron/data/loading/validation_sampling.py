"""Validation draws, which feed the balancers: stratified samples of the validation split.

A draw is a pure function of (data set, seed, index of the draw) and does not depend on the parallel layout. Every draw
has the same number of samples of a task. A task's samples follow one named permutation after another, as in training,
so that all are drawn equally often. The rule is in docs/LOSSES.md §4.
"""

import functools

import numpy as np

from mft_megatron.batch import Ranks
from mft_megatron.data import _sample_index
from mft_megatron.data.permutation import named_permutation
from mft_megatron.data.sample_slices import NO_SLICES, SampleSlices, ranges, supervised_tokens

from .dataset import PackedDataset, PackedSplit, Rows


class ValidationDraws:
    """The draws of a split.

    Attributes:
        dataset: of the split.
        known_K: bool [K], tasks that have samples with supervised tokens; the others are in no draw.
        samples_K: int64 [K], samples of each task in a draw.
    """

    def __init__(self, split: PackedSplit, seed: int, num_packs: int):
        """Divide the samples by task.

        Args:
            split: to draw from.
            seed: of the run.
            num_packs: packs of a draw, approximately.
        """
        self.dataset = split.dataset
        self._name = f"{split.dataset.dataset_hash}/{split.name}/{seed}/draw"
        self._split = split
        self._units_of_task, lengths = _supervised_units(split)
        # a draw needs one permutation of each task, or two where one ends
        self._permutation = functools.lru_cache(maxsize=2 * split.num_tasks)(self._named_permutation)
        self.known_K = np.array([len(units) > 0 for units in self._units_of_task])
        self.samples_K = np.zeros(split.num_tasks, np.int64)
        budget = num_packs * split.seq_length / max(int(self.known_K.sum()), 1)
        for task in np.flatnonzero(self.known_K):
            units = self._units_of_task[task]
            self.samples_K[task] = min(max(int(budget / lengths[units].mean()), 1), len(units))

    def rows(self, draw: int) -> Rows:
        """Pack one draw into rows; ``draw`` is its index, from 0."""
        units = np.concatenate([self._drawn_units(int(task), draw) for task in np.flatnonzero(self.known_K)])
        if self.dataset.joined:
            return [self._split.slices_of(unit) for unit in units]
        slices = self._split.slices(units)
        lengths = np.ascontiguousarray(slices.lengths, np.int32)
        packed, offsets = _sample_index.best_fit_decreasing(lengths, self.dataset.seq_length)
        return [slices.take(indices) for indices in np.split(packed, offsets[1:-1])]

    def _drawn_units(self, task: int, draw: int) -> np.ndarray:
        units, count = self._units_of_task[task], self.samples_K[task]
        epochs, indices = np.divmod(np.arange(draw * count, (draw + 1) * count), len(units))
        permutations = {epoch: self._permutation(task, int(epoch)) for epoch in np.unique(epochs)}
        return units[[permutations[epoch][index] for epoch, index in zip(epochs, indices, strict=True)]]

    def _named_permutation(self, task: int, epoch: int) -> np.ndarray:
        return named_permutation(f"{self._name}/{task}/{epoch}", len(self._units_of_task[task]))


def shard_rows(rows: Rows, ranks: Ranks, micro_batch_size: int, batch_multiple: int) -> list[Rows]:
    """Choose the rows of one data-parallel rank, by micro-batch.

    Args:
        rows: of all ranks.
        ranks: position of the rank.
        micro_batch_size: rows of a micro-batch.
        batch_multiple: empty rows are added up to a multiple of this, itself a multiple of ``micro_batch_size ·
            data_size``, so that all ranks have the same number of micro-batches.
    """
    rows = [*rows, *[NO_SLICES] * (-len(rows) % batch_multiple)]
    first, of_all_ranks = ranks.data_rank * micro_batch_size, ranks.data_size * micro_batch_size
    return [rows[start + first : start + first + micro_batch_size] for start in range(0, len(rows), of_all_ranks)]


def _supervised_units(split: PackedSplit) -> tuple[list[np.ndarray], np.ndarray]:
    """Find the units that draws consist of: slices, or packs where these are joined.

    Returns:
        units: int64 indices of each task's units that supervise anything, ordered by sample.
        lengths: int64 [units], tokens of all units.
    """
    slices = split.slices(slice(0, split.num_slices))
    if split.dataset.joined:
        packs = np.arange(split.num_packs)
        _, counts = split.slices_of_packs(packs)
        first = counts.cumsum() - counts
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
    """Number of supervised targets of each slice, int64 [P]; the masks of all slices are in memory at once."""
    first = dataset.mask.start_of(slices.samples) + slices.starts
    return supervised_tokens(dataset.mask.items[ranges(first, slices.lengths)], slices.lengths)
