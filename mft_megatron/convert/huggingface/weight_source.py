"""A Hugging Face folder that a run starts from directly: each rank reads its slices of the weights."""

import contextlib
from pathlib import Path

from torch import Tensor

from mft_megatron.mcore.checkpointing.weight_source import WeightSlice

from .mapped_source import MappedSource
from .model_folder import copy_kept_files, read_architecture
from .model_import import describe_folder, refuse_mismatch
from .row_layouts import sizes_of
from .safetensors_reader import WeightFiles


class HuggingFaceSource:
    """The model of ``--hf-checkpoint DIR``: its description in ``info``, and its weights."""

    def __init__(self, folder: str):
        """Open a folder and check its weights.

        Raises:
            InputError: the model is not supported, or the folder is incomplete.
        """
        self.folder = Path(folder)
        family, architecture, vocab_size = read_architecture(self.folder)
        weights, sizes = family.weights(architecture), sizes_of(architecture, vocab_size)
        with contextlib.closing(WeightFiles(self.folder)) as files:
            refuse_mismatch(files, family, architecture, vocab_size)
            self._files = files
        self._weights = MappedSource(files, weights, sizes)
        self.info = describe_folder(files, family, architecture, vocab_size)

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self._files.close()

    def keep(self, target: Path) -> None:
        """Copy everything that an export gives back besides weights into the folder ``target``."""
        copy_kept_files(self.folder, target)

    def read(self, wanted: WeightSlice) -> Tensor:
        """Read one slice of a weight of Megatron-Core, as :meth:`MappedSource.read` does."""
        return self._weights.read(wanted)
