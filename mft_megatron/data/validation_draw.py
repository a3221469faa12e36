"""Stratified draws from the validation split, for the balancers: a little of every task, again and again.

A draw is a pure function of (data set, seed, number of the draw). Every task gives the same number of samples to each
draw and goes through its samples in one named order after another, as the training data do, so that each sample is
drawn equally often. It does not depend on the layout. docs/LOSSES.md §4 has the rule.
"""

import functools

import numpy as np

from mft_megatron.batch import Ranks
from mft_megatron.data import _sample_index
from mft_megatron.data.dataset import PackedSplit
from mft_megatron.data.order import named_order


class ValidationDraws:
    """Draws of about ``num_packs`` packs from a split.

    ``known_K`` bool [K]: tasks that have samples with supervised tokens; the others are in no draw.
    ``samples_K`` int64 [K]: how many samples each gives to a draw.
    """

    def __init__(self, split: PackedSplit, seed: int, num_packs: int):
        self.dataset = split.dataset
        self._name = f"{split.dataset.dataset_hash}/{split.name}/{seed}/draw"
        self._samples_of_task = _supervised_samples(split)
        # a draw needs one order of each task, or two where one ends
        self._order = functools.lru_cache(maxsize=2 * split.num_tasks)(self._named_order)
        self.known_K = np.array([len(samples) > 0 for samples in self._samples_of_task])
        self.samples_K = np.zeros(split.num_tasks, np.int64)
        budget = num_packs * split.seq_length / max(int(self.known_K.sum()), 1)
        for task in np.flatnonzero(self.known_K):
            samples = self._samples_of_task[task]
            mean_length = self.dataset.tokens.lengths[samples].mean()
            self.samples_K[task] = min(max(int(budget / mean_length), 1), len(samples))

    def rows(self, number: int) -> list[np.ndarray]:
        """Samples of one draw, packed: int64 sample numbers of each row."""
        samples = np.concatenate([self._taken(int(task), number) for task in np.flatnonzero(self.known_K)])
        lengths = np.ascontiguousarray(self.dataset.tokens.lengths[samples], np.int32)
        within, offsets = _sample_index.best_fit_decreasing(lengths, self.dataset.seq_length)
        return np.split(samples[within], offsets[1:-1])

    def _taken(self, task: int, number: int) -> np.ndarray:
        samples, count = self._samples_of_task[task], self.samples_K[task]
        epochs, places = np.divmod(np.arange(number * count, (number + 1) * count), len(samples))
        orders = {epoch: self._order(task, int(epoch)) for epoch in np.unique(epochs)}
        return samples[[orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)]]

    def _named_order(self, task: int, epoch: int) -> np.ndarray:
        return named_order(f"{self._name}/{task}/{epoch}", len(self._samples_of_task[task]))


def deal(rows: list[np.ndarray], ranks: Ranks, micro_batch_size: int, multiple: int) -> list[list[np.ndarray]]:
    """Rows of one data-parallel rank by micro-batch.

    Args:
        rows: sample numbers of each row.
        multiple: empty rows are added up to a multiple of this, itself one of ``micro_batch_size · data_size``, so that
            all ranks have the same number of micro-batches.
    """
    rows = rows + [np.zeros(0, np.int64)] * (-len(rows) % multiple)
    first, together = ranks.data_rank * micro_batch_size, ranks.data_size * micro_batch_size
    return [rows[start + first : start + first + micro_batch_size] for start in range(0, len(rows), together)]


def _supervised_samples(split: PackedSplit) -> list[np.ndarray]:
    """Sample numbers, ascending, of each task's samples in the split that supervise anything."""
    samples = np.sort(np.concatenate([split.samples_of(pack) for pack in range(split.num_packs)]))
    starts, lengths = split.dataset.tokens.starts, split.dataset.tokens.lengths
    mask = split.dataset.mask.items
    # the first token of a sample is no target
    supervised = np.array([bool(mask[starts[s] + 1 : starts[s] + lengths[s]].any()) for s in samples])
    samples = samples[supervised]
    task_ids = np.asarray(split.dataset.task_ids)[samples]
    return [samples[task_ids == task] for task in range(split.num_tasks)]
