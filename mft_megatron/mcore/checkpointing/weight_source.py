"""Sources of weights, read slice by slice: the protocol that every source follows, and a checkpoint as a source.

Sources are a checkpoint (:class:`CheckpointSource`), a Hugging Face folder and a PEFT adapter (both in ``convert``).
Each rank asks a source for its slices of the weights alone, so that no rank holds a whole model.
"""

import dataclasses
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mft_megatron.errors import InputError
from mft_megatron.run_folder import CheckpointInfo

from .finite import refuse_non_finite
from .tensor_reader import TensorReader
from .vocabulary import VOCABULARY_WEIGHTS


@dataclasses.dataclass(frozen=True)
class WeightSlice:
    """A rectangle of one weight, by the weight's name in a checkpoint.

    Weights of a kind are stacked in a checkpoint: by layer, those of experts by layer and expert.

    Attributes:
        name: the weight's name in a checkpoint; one name for all layers.
        index: ``(layer,)``, ``(layer, expert)``, or ``()`` for a weight that is not stacked.
        start: first row and first column; first element of a vector.
        shape: rows and columns; elements of a vector.
    """

    name: str
    index: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def offset(self) -> tuple[int, ...]:
        """First element on every axis of the stacked weight."""
        return (*self.index, *self.start)

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """Shape on every axis of the stacked weight."""
        return (*(1 for _ in self.index), *self.shape)

    @property
    def region(self) -> tuple[slice, ...]:
        """The slice as an index of a whole weight [rows, columns]: ``weight[region]``."""
        return tuple(slice(start, start + size) for start, size in zip(self.start, self.shape, strict=True))


class WeightSource(Protocol):
    """Source of any slice of a model's weights."""

    def read(self, wanted: WeightSlice) -> Tensor:
        """Read one slice.

        Returns:
            its content, of ``wanted.shape``, on the CPU, in the source's dtype; rows beyond the vocabulary are 0.

        Raises:
            InputError: the source has no such weight, or is damaged.
        """


class CheckpointSource:
    """Weights of the checkpoint in one ``iter_NNNNNNN`` folder, for a run whose base is not in its own checkpoints.

    A weight of a layer is read whole and kept until another one is read: slices of one weight, such as gate and up
    projection, are read consecutively. Memory is that of one weight.
    """

    def __init__(self, path: Path, info: CheckpointInfo):
        """Open a checkpoint.

        Args:
            path: the checkpoint's folder.
            info: its description.

        Raises:
            InputError: the checkpoint's index is missing or damaged.
        """
        self.info = info
        self._path = path
        self._reader = TensorReader(path)
        self._last: tuple[tuple[str, tuple[int, ...]], Tensor] | None = None

    def read(self, wanted: WeightSlice) -> Tensor:
        """Read one slice, on the CPU, in the dtype that it is stored in. Rows beyond the vocabulary are 0.

        Raises:
            InputError: the checkpoint has no such weight or slice, or is damaged.
        """
        weight = self._whole(wanted.name, wanted.index)
        needed = [axis.stop for axis in wanted.region]
        if wanted.name in VOCABULARY_WEIGHTS:
            needed[0] = self.info.vocab_size
        if weight.dim() != len(needed) or any(n > there for n, there in zip(needed, weight.shape, strict=True)):
            raise InputError(
                f"{self._path}: {wanted.name} has the shape {list(weight.shape)}, at least {needed} is needed; it is a "
                "checkpoint of another model"
            )
        real = min(wanted.shape[0], max(0, needed[0] - wanted.start[0]))
        rows = slice(wanted.start[0], wanted.start[0] + real)
        content = weight[(rows, *wanted.region[1:])]
        if real == wanted.shape[0]:
            return content
        padded = torch.zeros(wanted.shape, dtype=content.dtype)
        padded[:real] = content
        return padded

    def _whole(self, name: str, index: tuple[int, ...]) -> Tensor:
        if self._last is not None and self._last[0] == (name, index):
            return self._last[1]
        self._last = None  # frees it before the next one is in memory
        if not self._reader.has_entry(name):
            raise InputError(f"{self._path}: has no {name}; it is a checkpoint of another model, or of adapters")
        stack = self._reader.entry(name)[0][: len(index)]
        if any(position >= size for position, size in zip(index, stack, strict=True)):
            raise InputError(
                f"{self._path}: has {stack[0]} layers of {name}, and layer {index[0]} is needed; it is a "
                "checkpoint of another model"
            )
        weight = self._reader.read(name, index)
        refuse_non_finite(weight, f"{self._path}: {name} {list(index) or ''}", "take an earlier checkpoint")
        self._last = (name, index), weight
        return weight
