"""Activation recompute: Megatron-Core's options for it, and what it needs where there is no Transformer Engine."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import functools
from typing import Any

from megatron.core.tensor_parallel import random

from mft_megatron.arguments.groups.recompute import RecomputeArguments


def recompute_options(recompute: RecomputeArguments) -> dict[str, Any]:
    """Fields of Megatron-Core's ``TransformerConfig``."""
    if recompute.recompute_granularity == "selective" and not random.HAVE_TE:
        _without_transformer_engine()
    return {
        "recompute_granularity": recompute.recompute_granularity,
        "recompute_method": recompute.recompute_method,
        "recompute_num_layers": recompute.recompute_num_layers,
        "recompute_modules": list(recompute.recompute_modules or ()) or None,
        "distribute_saved_activations": recompute.distribute_saved_activations,
    }


@functools.cache
def _without_transformer_engine() -> None:
    """Recompute of norms and of experts' activation functions without fp8.

    What Megatron-Core asks there is whether its argument is ``None``, and the default is ``False``: so it would ask
    Transformer Engine about fp8, which is not here.
    """
    random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)
