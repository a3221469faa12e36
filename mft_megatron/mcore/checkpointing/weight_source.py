"""A checkpoint as the source of a model's weights, read by name and part: each rank reads what it needs.

For a run that starts from a base it does not save: its own checkpoints have adapters alone.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mft_megatron.errors import InputError
from mft_megatron.run_folder import CheckpointInfo

from .tensor_reader import TensorReader
from .vocabulary import VOCABULARY_WEIGHTS


class CheckpointSource:
    """Weights of the checkpoint in one ``iter_NNNNNNN`` folder.

    A weight of a layer is read whole and kept until another one is asked for: parts of one, such as gate and up
    projection, come one after the other. Memory is that of one weight.
    """

    def __init__(self, path: Path, info: CheckpointInfo):
        """
        Args:
            path: the checkpoint's folder.
            info: its description.

        Raises:
            InputError: the checkpoint's index is missing or damaged.
        """
        self.info = info
        self._path = path
        self._reader = TensorReader(path)
        self._last: tuple[Any, Tensor | None] = (None, None)

    def read(self, name: str, place: tuple[int, ...], first: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A part of a weight, on the CPU, in the dtype that it is stored in.

        Args:
            name: in the checkpoint.
            place: its layer, or ``(layer, expert)``; empty for what is not part of a stack.
            first: row and column, or row alone, at which the part begins.
            shape: of the part. Rows beyond the vocabulary are 0.

        Raises:
            InputError: the checkpoint has no such weight or part, or is damaged.
        """
        weight = self._whole(name, place)
        needed = [start + n for start, n in zip(first, shape, strict=True)]
        if name in VOCABULARY_WEIGHTS:
            needed[0] = self.info.vocab_size
        if weight.dim() != len(shape) or any(n > there for n, there in zip(needed, weight.shape, strict=True)):
            raise InputError(
                f"{self._path}: {name} has the shape {list(weight.shape)}, at least {needed} is needed; it is a "
                "checkpoint of another model"
            )
        real = min(shape[0], max(0, needed[0] - first[0]))
        part = weight[tuple(slice(start, start + n) for start, n in zip(first, (real, *shape[1:]), strict=True))]
        if real == shape[0]:
            return part
        padded = torch.zeros(shape, dtype=part.dtype)
        padded[:real] = part
        return padded

    def forget(self) -> None:
        """Free the weight that was read last."""
        self._last = (None, None)

    def _whole(self, name: str, place: tuple[int, ...]) -> Tensor:
        if self._last[0] != (name, place):
            self.forget()  # before the next one is in memory, too
            if not self._reader.has_entry(name):
                raise InputError(f"{self._path}: has no {name}; it is a checkpoint of another model, or of adapters")
            stack = self._reader.entry(name)[0][: len(place)]
            if any(index >= size for index, size in zip(place, stack, strict=True)):
                raise InputError(
                    f"{self._path}: has {stack[0]} layers of {name}, and number {place[0]} is needed; it is a "
                    "checkpoint of another model"
                )
            self._last = (name, place), self._reader.read([(name, place)])[0]
        return self._last[1]
