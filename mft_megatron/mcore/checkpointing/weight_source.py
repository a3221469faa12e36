"""Sources of weights, read slice by slice: the protocol that every source follows, and a checkpoint as a source.

Sources are a checkpoint (:class:`CheckpointSource`), a Hugging Face folder and a PEFT adapter (both in ``convert``).
Each rank asks a source for its slices of the weights alone, so that no rank holds a whole model.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mft_megatron.errors import InputError
from mft_megatron.run_folder.description import CheckpointInfo

from .blocks import overlap
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

    Of a weight of a layer those chunks are read, whole, that a slice needs a part of, and kept until another weight is
    read: slices of one weight, such as gate and up projection, are read consecutively. Memory is that of one weight.
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
        self._weight: tuple[str, tuple[int, ...]] | None = None
        self._chunks: dict[tuple[int, ...], Tensor] = {}

    def read(self, wanted: WeightSlice) -> Tensor:
        """Read one slice, on the CPU, in the dtype that it is stored in. Rows beyond the vocabulary are 0.

        Raises:
            InputError: the checkpoint has no such weight or slice, or is damaged.
        """
        needed = [axis.stop for axis in wanted.region]
        if wanted.name in VOCABULARY_WEIGHTS:
            needed[0] = self.info.vocab_size
        dtype = self._require(wanted, needed)
        if self._weight != (wanted.name, wanted.index):
            self._chunks = {}  # frees them before the next ones are in memory
            self._weight = wanted.name, wanted.index
        content = torch.zeros(wanted.stacked_shape, dtype=dtype)
        real = min(wanted.shape[0], max(0, needed[0] - wanted.start[0]))
        # only the rows of real tokens, whatever the checkpoint has beyond
        shape = (*wanted.stacked_shape[: len(wanted.index)], real, *wanted.shape[1:])
        for offset, sizes in self._reader.chunks(wanted.name):
            common = overlap(offset, sizes, wanted.offset, shape)
            if common is not None:
                content[common[1]] = self._chunk(wanted, offset, sizes)[common[0]]
        return content.view(wanted.shape)

    def _require(self, wanted: WeightSlice, needed: Sequence[int]) -> torch.dtype:
        """Check that the checkpoint has a weight of at least the shape ``needed``; returns its dtype."""
        if not self._reader.has_entry(wanted.name):
            raise InputError(f"{self._path}: has no {wanted.name}; it is a checkpoint of another model, or of adapters")
        shape, dtype = self._reader.entry(wanted.name)
        stack, weight = shape[: len(wanted.index)], shape[len(wanted.index) :]
        if any(position >= size for position, size in zip(wanted.index, stack, strict=True)):
            raise InputError(
                f"{self._path}: has {stack[0]} layers of {wanted.name}, and layer {wanted.index[0]} is needed; it is a "
                "checkpoint of another model"
            )
        if len(weight) != len(needed) or any(n > there for n, there in zip(needed, weight, strict=True)):
            raise InputError(
                f"{self._path}: {wanted.name} has the shape {list(weight)}, at least {list(needed)} is needed; it is a "
                "checkpoint of another model"
            )
        return dtype

    def _chunk(self, wanted: WeightSlice, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A stored chunk, whole, read once while slices of its weight are asked for."""
        if offset not in self._chunks:
            chunk = self._reader.read_region(wanted.name, offset, shape)
            where = f"{self._path}: {wanted.name} {list(wanted.index) or ''}"
            refuse_non_finite(chunk, where, "take an earlier checkpoint")
            self._chunks[offset] = chunk
        return self._chunks[offset]
