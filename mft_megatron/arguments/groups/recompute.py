"""Activations that are computed again in the backward pass instead of being kept."""

import dataclasses

from mft_megatron.options import option

MODULES = ("core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts")


@dataclasses.dataclass(frozen=True)
class RecomputeArguments:
    """Less memory for more time; the numbers stay the same, bit for bit, with dropout, too."""

    recompute_activations: bool = option(False, "The same as --recompute-granularity selective.")
    recompute_granularity: str | None = option(
        None,
        "What is computed again: whole layers (full, about a third more time), or the parts of each layer that "
        "--recompute-modules names (selective).",
        choices=("full", "selective"),
    )
    recompute_method: str | None = option(
        None,
        "Which layers full takes. uniform: all; only the input of each --recompute-num-layers layers is kept. block: "
        "the first --recompute-num-layers of each stage, one by one; the others keep all.",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int | None = option(
        None, "Layers of a unit (uniform), or of a stage (block), of --recompute-granularity full.", at_least=1
    )
    recompute_modules: tuple[str, ...] | None = option(
        None,
        "What selective takes in each layer: core attention (core_attn, taken where nothing is given), the norms "
        "before attention and MLP (layernorm), the MLP of dense layers (mlp), of layers with experts all of it (moe), "
        "the activation function of grouped experts (moe_act) or the shared experts (shared_experts).",
        choices=MODULES,
    )
    distribute_saved_activations: bool = option(
        False, "With full: each tensor-parallel rank keeps its part alone of the inputs that are kept."
    )
