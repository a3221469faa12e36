"""Activation recompute: the options of Megatron-Core."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from typing import Any

from mft_megatron.arguments.groups.recompute import RecomputeArguments
from mft_megatron.mcore.platform.megatron_fixes import recompute_without_transformer_engine


def recompute_options(recompute: RecomputeArguments) -> dict[str, Any]:
    """Fields of Megatron-Core's ``TransformerConfig`` for activation recompute."""
    if recompute.recompute_granularity == "selective":
        recompute_without_transformer_engine()
    return {
        "recompute_granularity": recompute.recompute_granularity,
        "recompute_method": recompute.recompute_method,
        "recompute_num_layers": recompute.recompute_num_layers,
        "recompute_modules": list(recompute.recompute_modules or ()) or None,
        "distribute_saved_activations": recompute.distribute_saved_activations,
    }
