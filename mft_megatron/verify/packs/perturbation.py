"""A data set in which the tokens of one slice are replaced, as it is read; nothing on disk changes."""

import copy
from typing import Any

import numpy as np

from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.sample_slices import SampleSlices


class ReplacedItems:
    """Items of an indexed data set, some consecutive ones replaced."""

    def __init__(self, items: np.ndarray, first: int, replacement: np.ndarray):
        """Replace the items from ``first`` on by ``replacement``, int [n], when they are read."""
        self._items, self._first, self._replacement = items, first, replacement

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Read items by their indices, int64 [k]."""
        read = np.array(self._items[indices])
        offset = indices - self._first
        replaced = (offset >= 0) & (offset < len(self._replacement))
        read[replaced] = self._replacement[offset[replaced]]
        return read


def item_ranges(dataset: PackedDataset, row: SampleSlices) -> tuple[np.ndarray, np.ndarray]:
    """Positions of slices in the files of the data set: first item of each and the one after its last, int64 [P]."""
    first = dataset.tokens.start_of(row.samples) + row.starts
    return first, first + row.lengths


def replace_slice(dataset: PackedDataset, row: SampleSlices, index: int, seed: int) -> PackedDataset:
    """Replace every token of a slice by another one of the vocabulary; its mask and everything else stay.

    Args:
        dataset: of the row.
        row: slices of a row.
        index: of the slice in the row.
        seed: of the replacement.

    Returns:
        a data set that rows can be built from like from ``dataset``.
    """
    first, last = (int(bounds[index]) for bounds in item_ranges(dataset, row))
    shift = np.random.default_rng(seed).integers(1, dataset.vocab_size, last - first)
    replacement = (dataset.tokens.items[first:last] + shift) % dataset.vocab_size
    replaced = copy.copy(dataset)
    tokens: Any = copy.copy(dataset.tokens)
    tokens.items = ReplacedItems(dataset.tokens.items, first, replacement)
    replaced.tokens = tokens
    return replaced
