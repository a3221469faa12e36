"""A Hugging Face folder that a run starts from directly: each rank reads its part of each weight."""

import contextlib
from pathlib import Path

from torch import Tensor

from mft_megatron.mcore.checkpointing.weight_source import WeightSlice
from mft_megatron.run_folder import CheckpointInfo

from . import model_folder
from .model_import import describe, refuse_mismatch, stored_dtype
from .row_layouts import sizes_of
from .row_source import RowSource
from .safetensors_reader import WeightFiles


class HuggingFaceSource:
    """``--hf-checkpoint DIR``: what it is, its weights, and what is kept of it."""

    def __init__(self, folder: str):
        """
        Raises:
            InputError: the model is not supported, or its folder is not whole.
        """
        self.folder = Path(folder)
        family, architecture, vocab_size = model_folder.read_architecture(self.folder)
        rows, sizes = family.rows(architecture), sizes_of(architecture, vocab_size)
        with contextlib.closing(WeightFiles(self.folder)) as files:
            refuse_mismatch(files, rows, architecture, sizes)
            self._files = files
        self._weights = RowSource(files, rows, sizes)
        dtype = stored_dtype(files, rows, architecture, sizes)
        self.info: CheckpointInfo = describe(family.architecture, architecture, vocab_size, dtype)

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self._files.close()

    def keep(self, target: Path) -> None:
        """Copy what an export is to give back."""
        model_folder.copy_kept_files(self.folder, target)

    def read(self, wanted: WeightSlice) -> Tensor:
        """Read one slice of a weight of Megatron-Core's, as :meth:`RowSource.read` does."""
        return self._weights.read(wanted)
