"""A Hugging Face folder as a source of weights, for imports and for runs that start from it directly."""

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mft_megatron.mcore.checkpointing.weight_source import WeightSlice
from mft_megatron.mcore.platform.precisions import model_dtype

from .converted_checkpoint import describe
from .model_folder import copy_files, kept_files, read_architecture, unread_entries
from .row_layouts import sizes_of, slice_blocks
from .safetensors_reader import WeightFiles
from .weight_check import refuse_mismatch, renaming_of


class HuggingFaceSource:
    """The model in a Hugging Face folder: a :class:`WeightSource`.

    Attributes:
        folder: the folder.
        family: its model family.
        architecture: its sizes.
        mapped: the family's weights for this architecture.
        sizes: sizes of rows and columns.
        files: the weights in the folder.
        info: description of the model; its precision is that of its largest weight.
        notes: lines for the user about entries of ``config.json`` that are not read and weights with other names.
    """

    def __init__(self, folder: Path | str):
        """Open a folder and check its weights.

        Raises:
            InputError: the model is not supported, or the folder is incomplete or damaged.
        """
        self.folder = Path(folder)
        self.family, self.architecture, vocab_size = read_architecture(self.folder)
        self._kept = kept_files(self.folder)
        self.mapped = self.family.weights(self.architecture)
        self.sizes = sizes_of(self.architecture, vocab_size)
        with contextlib.closing(WeightFiles(self.folder)) as files:
            renaming = renaming_of(files, self.family, self.architecture)
            if renaming is not None:
                files.rename(renaming.names)
            refuse_mismatch(files, self.family, self.architecture, vocab_size)
            self.files = files
        dtype = model_dtype(
            (
                (*weight.stack(self.architecture), *weight.shape(self.sizes)),
                files.weights[weight.hf_names[0].format(0, 0)].dtype,
            )
            for weight in self.mapped
        )
        renamed = None if renaming is None else f"{self.folder}: {renaming.cause}, and so are all others; they are read"
        self.notes: Sequence[str] = [note for note in (unread_entries(self.folder), renamed) if note is not None]
        self.info = describe(self.family.architecture, self.architecture, vocab_size, dtype)
        self._by_name = {weight.name: weight for weight in self.mapped}

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self.files.close()

    def keep(self, target: Path) -> None:
        """Copy everything that an export gives back besides weights into the folder ``target``."""
        copy_files(self._kept, self.folder, target)

    def read(self, wanted: WeightSlice) -> Tensor:
        """Read one slice, in the dtype that it is stored in. Rows beyond the vocabulary are 0.

        Where parts of a weight, such as gate and up projection, are stored in several dtypes, that is the widest.

        Raises:
            InputError: a file has become shorter.
        """
        weight = self._by_name[wanted.name]
        blocks, names = weight.blocks(self.sizes), weight.hf_names_at(wanted.index)
        first, column = wanted.start[0], wanted.start[1] if wanted.start[1:] else 0
        dtypes = [self.files.weights[name].dtype for name in names]
        content = torch.zeros(wanted.shape, dtype=functools.reduce(torch.promote_types, dtypes))
        filled = 0
        # rows beyond the vocabulary are in no block and stay 0
        for block in slice_blocks(blocks, first, first + wanted.shape[0]):
            rows = content[filled : filled + block.rows]
            stored = rows if rows.dtype == dtypes[block.source] else torch.empty_like(rows, dtype=dtypes[block.source])
            self.files.read_block(stored, names[block.source], block.start, column)
            if stored is not rows:
                rows.copy_(stored)
            filled += block.rows
        return content
