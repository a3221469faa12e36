"""Seed and initial weights."""

import dataclasses

from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class InitializationArguments:
    """The same seed gives the same weights on every parallel layout (Megatron: only on the same one)."""

    seed: int = option(1234, "Seed of weights, dropout and data order.", at_least=0, below=2**63)
    init_method_xavier_uniform: bool = option(
        False,
        "Initialise matrices from Glorot's uniform distribution instead of a normal one. Unlike in Megatron the "
        "bounds are those of whole matrices, whatever the tensor-parallel size.",
    )
    embedding_init_method_std: float | None = option(
        None, "Standard deviation of the initial embedding. Not given: initialised like all matrices.", at_least=0
    )
    init_method_std: float = option(0.02, "Standard deviation of the initial weights.", at_least=0)
