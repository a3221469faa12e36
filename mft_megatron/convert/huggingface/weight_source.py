"""A Hugging Face folder that a run starts from directly: each rank reads its part of each weight."""

import contextlib
from pathlib import Path

import torch
from torch import Tensor

from mft_megatron.run_folder import CheckpointInfo

from . import model_folder
from .model_import import describe, refuse_mismatch
from .row_layouts import part, rows_of, sizes_of
from .safetensors_files import WeightFiles


class HuggingFaceSource:
    """``--hf-checkpoint DIR``: what it is, its weights, and what is kept of it."""

    def __init__(self, folder: str):
        """
        Raises:
            InputError: the model is not supported, or its folder is not whole.
        """
        self.folder = Path(folder)
        family, architecture, vocab_size = model_folder.read_architecture(self.folder)
        self._rows = {row.ours: row for row in family.rows(architecture)}
        self._sizes = sizes_of(architecture, vocab_size)
        with contextlib.closing(WeightFiles(self.folder)) as files:
            refuse_mismatch(files, list(self._rows.values()), architecture, self._sizes)
            self._files = files
        dtypes = {files.weights[row.theirs[0].format(0, 0)].dtype for row in self._rows.values()}
        self.info: CheckpointInfo = describe(family.architecture, architecture, vocab_size, _largest(dtypes))

    def load(self, trainer: object) -> None:
        """Fill the trainer's model; each rank reads no more than its part."""
        from mft_megatron.mcore.checkpointing.load_weights import fill_weights

        with contextlib.closing(self._files):
            fill_weights(trainer, self.read)

    def keep(self, target: Path) -> None:
        """Copy what an export is to give back."""
        model_folder.keep(self.folder, target)

    def read(self, name: str, place: tuple[int, ...], first: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A part of a weight of Megatron-Core's; rows beyond the vocabulary are 0."""
        row = self._rows[name]
        blocks = row.blocks(self._sizes)
        real = max(0, min(shape[0], rows_of(blocks) - first[0]))
        stored = self._files.weights[row.theirs[0].format(*place)]
        content = torch.zeros(shape, dtype=stored.dtype)
        at = 0
        for block in part(blocks, first[0], first[0] + real):
            rows = content[at : at + block.rows]
            self._files.read_part(
                rows, row.theirs[block.source].format(*place), block.start, first[1] if first[1:] else 0
            )
            at += block.rows
        return content


def _largest(dtypes: set[torch.dtype]) -> torch.dtype:
    """The dtype that holds all."""
    return max(dtypes, key=lambda dtype: (dtype.itemsize, str(dtype)))
