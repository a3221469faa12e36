"""Layers of Transformer Engine (``--transformer-impl transformer_engine``), and the hardware that fp8 needs.

Linear layers, and the norms before them that they are fused with, are Transformer Engine's. Everything else is the same
as without it: attention, the last norm and those of queries and keys, embedding, output layer and losses. Parameters
have the same keys in a checkpoint as those of the local layers, so either implementation reads the other's checkpoints.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from mft_megatron.arguments.table import Arguments
from mft_megatron.errors import InputError
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.platform.optional_packages import TRANSFORMER_ENGINE, missing

# the lowest compute capability of each --fp8-recipe
FP8 = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


def require(arguments: Arguments) -> None:
    """Refuse Transformer Engine where it cannot work.

    Raises:
        InputError: there is no CUDA device, no whole installation, or the device has no such fp8.
    """
    options = arguments.transformer_engine
    wanted = f"--transformer-impl {options.transformer_impl}"
    if not devices.HAS_CUDA:
        raise InputError(f"{wanted} needs a CUDA device, and there is none here; use --transformer-impl local")
    reason = missing(TRANSFORMER_ENGINE)
    if reason is not None:
        raise InputError(f"{wanted} {reason}; or use --transformer-impl local")
    capability = devices.capability()
    if options.fp8_format is not None and capability < FP8[options.fp8_recipe]:
        needed, has = (".".join(map(str, version)) for version in (FP8[options.fp8_recipe], capability))
        raise InputError(
            f"--fp8-format {options.fp8_format} with --fp8-recipe {options.fp8_recipe} needs compute capability "
            f"{needed}, and this GPU has {has}; leave fp8 out"
        )


def layer_spec(config: TransformerConfig, has_experts: bool = False) -> ModuleSpec:
    """Specify a layer whose linear layers are Transformer Engine's, each fused with the norm before it."""
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if has_experts else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
