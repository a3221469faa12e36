"""The adapters of a checkpoint, read one Hugging Face matrix at a time."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mft_megatron.errors import InputError
from mft_megatron.lora import LORA_A, LORA_B, Lora, is_adapter
from mft_megatron.mcore.checkpointing.tensor_reader import TensorReader
from mft_megatron.run_folder import CheckpointInfo

from .adapter_rows import AdaptedRow, Matrix, adapted_rows, family_of_info

Factors = tuple[Tensor, Tensor]


class AdapterReader:
    """The adapters in one ``iter_NNNNNNN`` folder. ``lora``: what they are, ``rows``: on which weights."""

    def __init__(self, checkpoint: Path, info: CheckpointInfo):
        """
        Raises:
            InputError: it has no adapters, not those that its description names, or no family has such a model.
        """
        self.lora = lora_of(checkpoint, info)
        self.family, self.architecture = family_of_info(info)
        try:
            self.rows = adapted_rows(self.lora, self.family, self.architecture)
        except InputError as error:
            raise InputError(f"{checkpoint}: {error}") from None
        self._reader = TensorReader(checkpoint)
        self._refuse_mismatch(checkpoint)
        self._where = {
            f"{matrix.name.format(layer)}.weight": (row, layer, number)
            for row in self.rows
            for layer in range(self.architecture.num_layers)
            for number, matrix in row.matrices.items()
        }
        self._last: tuple[object, dict[int, Factors]] = (None, {})

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.lora.scale

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices, as they are stored."""
        return self._reader.entry(self.rows[0].ours + LORA_A)[1]

    def matrices(self) -> Iterator[tuple[int, Matrix]]:
        """Every Hugging Face matrix with an adapter and its layer, layer by layer."""
        for layer in range(self.architecture.num_layers):
            for row in self.rows:
                for matrix in row.matrices.values():
                    yield layer, matrix

    def factors(self, weight: str) -> Factors | None:
        """A and B of a Hugging Face weight by its name, ``None`` for one that has no adapter.

        Raises:
            InputError: a file of the checkpoint is missing or damaged.
        """
        if weight not in self._where:
            return None
        row, layer, number = self._where[weight]
        if self._last[0] != (row.ours, layer):
            a, b = (self._reader.read(row.ours + letter, (layer,)) for letter in (LORA_A, LORA_B))
            self._last = (row.ours, layer), row.factors(a, b)
        return self._last[1][number]

    def _refuse_mismatch(self, checkpoint: Path) -> None:
        expected = _shapes(self.rows, self.architecture.num_layers)
        found = {name for name in self._reader.names() if is_adapter(name)}
        for names, what in ((expected.keys() - found, "has no"), (found - expected.keys(), "has unexpected")):
            if names:
                raise InputError(
                    f"{checkpoint}: {what} {', '.join(sorted(names))}; its description says "
                    f"{self.lora.describe()}; the checkpoint is damaged"
                )
        for name, shape in expected.items():
            if (stored := self._reader.entry(name)[0]) != shape:
                raise InputError(
                    f"{checkpoint}: {name} has the shape {list(stored)}, its description says {list(shape)}; the "
                    "checkpoint is damaged"
                )


def _shapes(rows: tuple[AdaptedRow, ...], layers: int) -> dict[str, tuple[int, ...]]:
    return {name: (layers, *shape) for row in rows for name, shape in row.our_shapes().items()}


def lora_of(checkpoint: Path, info: CheckpointInfo) -> Lora:
    """What adapters a checkpoint has, by its description.

    Raises:
        InputError: it has none.
    """
    if info.lora is None:
        raise InputError(f"{checkpoint}: has no adapters; mcore-to-hf exports its model")
    return Lora.from_dict(info.lora)
