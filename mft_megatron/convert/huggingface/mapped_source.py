"""Slices of Megatron-Core's weights, read from the rows of a Hugging Face folder's weights."""

from collections.abc import Iterable

import torch
from torch import Tensor

from mft_megatron.mcore.checkpointing.weight_source import WeightSlice

from .mapped_weight import MappedWeight
from .row_layouts import Sizes, slice_blocks
from .safetensors_reader import WeightFiles


class MappedSource:
    """The weights of an open folder under Megatron-Core's names: a :class:`WeightSource`."""

    def __init__(self, files: WeightFiles, weights: Iterable[MappedWeight], sizes: Sizes):
        self._files, self._sizes = files, sizes
        self._weights = {weight.name: weight for weight in weights}

    def read(self, wanted: WeightSlice) -> Tensor:
        """Read one slice, in the dtype that it is stored in. Rows beyond the vocabulary are 0.

        Raises:
            InputError: a file has become shorter.
        """
        weight = self._weights[wanted.name]
        blocks, names = weight.blocks(self._sizes), weight.hf_names_at(wanted.index)
        first, column = wanted.start[0], wanted.start[1] if wanted.start[1:] else 0
        content = torch.zeros(wanted.shape, dtype=self._files.weights[names[0]].dtype)
        filled = 0
        # rows beyond the vocabulary are in no block and stay 0
        for block in slice_blocks(blocks, first, first + wanted.shape[0]):
            rows = content[filled : filled + block.rows]
            self._files.read_block(rows, names[block.source], block.start, column)
            filled += block.rows
        return content
