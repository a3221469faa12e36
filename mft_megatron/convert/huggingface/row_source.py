"""Slices of Megatron-Core's weights, read from the rows of a Hugging Face folder's weights."""

from collections.abc import Iterable

import torch
from torch import Tensor

from mft_megatron.mcore.checkpointing.weight_source import WeightSlice

from .family import Row
from .row_layouts import Sizes, part, rows_of
from .safetensors_reader import WeightFiles


class RowSource:
    """The weights of an open folder under Megatron-Core's names: a :class:`WeightSource`."""

    def __init__(self, files: WeightFiles, rows: Iterable[Row], sizes: Sizes):
        self._files, self._sizes = files, sizes
        self._rows = {row.ours: row for row in rows}

    def read(self, wanted: WeightSlice) -> Tensor:
        """Read one slice, in the dtype that it is stored in. Rows beyond the vocabulary are 0.

        Raises:
            InputError: a file is shorter than it was.
        """
        row = self._rows[wanted.name]
        blocks = row.blocks(self._sizes)
        first, column = wanted.start[0], wanted.start[1] if wanted.start[1:] else 0
        real = max(0, min(wanted.shape[0], rows_of(blocks) - first))
        stored = self._files.weights[row.theirs[0].format(*wanted.index)]
        content = torch.zeros(wanted.shape, dtype=stored.dtype)
        at = 0
        for block in part(blocks, first, first + real):
            name = row.theirs[block.source].format(*wanted.index)
            self._files.read_block(content[at : at + block.rows], name, block.start, column)
            at += block.rows
        return content
