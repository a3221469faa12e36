"""Adapters of a checkpoint, read one Hugging Face matrix at a time."""

from collections.abc import Iterator

import torch

from mft_megatron.errors import InputError
from mft_megatron.lora import LORA_A, LORA_B, Lora, is_adapter
from mft_megatron.mcore.checkpointing.tensor_reader import TensorReader
from mft_megatron.run_folder.description import CheckpointRef

from .adapted_weights import AdaptedMatrix, Factors, adapted_weights, family_of_info, stacked_shapes


class AdapterReader:
    """The adapters of one checkpoint; those of the last weight that was read stay in memory.

    Attributes:
        lora: description of the adapters.
        weights: the adapted weights.
    """

    def __init__(self, checkpoint: CheckpointRef):
        """Open a checkpoint and check its adapters.

        Raises:
            InputError: the checkpoint has no adapters, others than its description says, or no family has such a model.
        """
        self.lora = lora_of_checkpoint(checkpoint)
        family, self._architecture = family_of_info(checkpoint.info)
        try:
            self.weights = adapted_weights(self.lora, family, self._architecture)
        except InputError as error:
            raise InputError(f"{checkpoint.path}: {error}") from None
        self._path, self._reader = checkpoint.path, TensorReader(checkpoint.path)
        self._refuse_mismatch()
        self._matrices = {
            f"{matrix.name.format(layer)}.weight": (weight, layer, position)
            for weight in self.weights
            for layer in range(self._architecture.num_layers)
            for position, matrix in weight.matrices.items()
        }
        self._last_weight = "", -1
        self._last_factors: dict[int, Factors] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored A's and B's."""
        return self._reader.entry(self.weights[0].prefix + LORA_A)[1]

    def matrices(self) -> Iterator[tuple[int, AdaptedMatrix]]:
        """Layer and matrix of every Hugging Face matrix with an adapter, layer by layer."""
        for layer in range(self._architecture.num_layers):
            for weight in self.weights:
                for matrix in weight.matrices.values():
                    yield layer, matrix

    def factors(self, hf_name: str) -> Factors | None:
        """Read A [rank, in] and B [out, rank] of a Hugging Face weight; ``None`` if it has no adapter.

        Raises:
            InputError: a file of the checkpoint is missing or damaged.
        """
        if hf_name not in self._matrices:
            return None
        weight, layer, position = self._matrices[hf_name]
        if self._last_weight != (weight.prefix, layer):
            a, b = (self._reader.read(weight.prefix + suffix, (layer,)) for suffix in (LORA_A, LORA_B))
            self._last_weight, self._last_factors = (weight.prefix, layer), weight.factors(a, b)
        return self._last_factors[position]

    def _refuse_mismatch(self) -> None:
        """Check that the checkpoint holds exactly the adapters of its description.

        Raises:
            InputError: an A or B is missing, unexpected, or of another shape.
        """
        expected = stacked_shapes(self.weights, self._architecture.num_layers)
        stored = {name for name in self._reader.names() if is_adapter(name)}
        for names, problem in ((expected.keys() - stored, "has no"), (stored - expected.keys(), "has unexpected")):
            if names:
                raise InputError(
                    f"{self._path}: {problem} {', '.join(sorted(names))}; its description says "
                    f"{self.lora.describe()}; the checkpoint is damaged"
                )
        for name, shape in expected.items():
            if (actual := self._reader.entry(name)[0]) != shape:
                raise InputError(
                    f"{self._path}: {name} has the shape {list(actual)}, its description says {list(shape)}; the "
                    "checkpoint is damaged"
                )


def lora_of_checkpoint(checkpoint: CheckpointRef) -> Lora:
    """The adapters that the description of a checkpoint names.

    Raises:
        InputError: it names none.
    """
    if checkpoint.info.lora is None:
        raise InputError(f"{checkpoint.path}: has no adapters; mcore-to-hf exports its model")
    return Lora.from_dict(checkpoint.info.lora)
