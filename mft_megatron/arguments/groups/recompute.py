"""Recomputation of activations in the backward pass instead of keeping them."""

import dataclasses

from mft_megatron.options import option

MODULES = ("core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts")


@dataclasses.dataclass(frozen=True)
class RecomputeArguments:
    """Less memory for more time; results are bitwise the same, also with dropout."""

    recompute_activations: bool = option(False, "The same as --recompute-granularity selective.")
    recompute_granularity: str | None = option(
        None,
        "What is recomputed: whole layers (full, about a third more time), or the parts of each layer that "
        "--recompute-modules names (selective).",
        choices=("full", "selective"),
    )
    recompute_method: str | None = option(
        None,
        "Layers that full recomputes. uniform: all; only the input of each --recompute-num-layers layers is kept. "
        "block: the first --recompute-num-layers of each stage, each separately; the others keep all activations.",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int | None = option(
        None, "Layers of a unit (uniform), or of a stage (block), of --recompute-granularity full.", at_least=1
    )
    recompute_modules: tuple[str, ...] | None = option(
        None,
        "What selective recomputes in each layer: core attention (core_attn, the default), the norms before "
        "attention and MLP (layernorm), the MLP of dense layers (mlp), the whole MLP of layers with experts (moe), "
        "the activation function of grouped experts (moe_act) or the shared experts (shared_experts).",
        choices=MODULES,
    )
    distribute_saved_activations: bool = option(
        False, "With full: split the kept inputs over the tensor-parallel ranks."
    )
