"""Megatron-Core's layer specification with this project's norms, attention and router."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from mft_megatron.arguments.table import Arguments
from mft_megatron.mcore.adapters.quantized_linear import quantize_layer
from mft_megatron.mcore.attention.packed_attention import PackedAttention
from mft_megatron.mcore.moe.router import PackedRouter
from mft_megatron.mcore.platform.releases import submodules_of

from . import transformer_engine
from .norm import NORMS
from .parallel_residual import ParallelResidualLayer


def block_spec(
    config: TransformerConfig, arguments: Arguments, virtual_stage: int | None
) -> TransformerBlockSubmodules:
    """Specify the layers of this rank's stage, or with interleaved stages of its ``virtual_stage``-th one."""
    first = get_transformer_layer_offset(config, virtual_stage)
    expert_layers = arguments.network.expert_layers[first : first + get_num_layers_to_build(config, virtual_stage)]
    layers = {has_experts: _layer(config, arguments, has_experts) for has_experts in sorted(set(expert_layers))}
    return TransformerBlockSubmodules(
        layer_specs=[layers[has_experts] for has_experts in expert_layers],
        layer_norm=NORMS[arguments.network.normalization],
    )


def _layer(config: TransformerConfig, arguments: Arguments, has_experts: bool) -> ModuleSpec:
    network = arguments.network
    norm = NORMS[network.normalization]
    if arguments.transformer_engine.transformer_impl == "transformer_engine":
        transformer_engine.require(arguments)
        layer = transformer_engine.layer_spec(config, has_experts)
    else:
        layer = get_gpt_layer_local_spec(
            num_experts=network.num_experts if has_experts else None,
            qk_layernorm=network.qk_layernorm,
            normalization=network.normalization,
        )
    if arguments.lora.peft_type == "qlora":
        quantize_layer(layer)
    attention, mlp = submodules_of(layer.submodules.self_attention), submodules_of(layer.submodules.mlp)
    if network.add_attention_bias:
        attention.linear_proj = with_bias(attention.linear_proj)
    if network.add_mlp_bias:
        mlp.linear_fc1, mlp.linear_fc2 = with_bias(mlp.linear_fc1), with_bias(mlp.linear_fc2)
    if has_experts:
        mlp.router = PackedRouter
        # Megatron-Core stores this norm under the name of the MLP's first matrix, which experts do not have
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    if network.parallel_residual:
        layer.module = ParallelResidualLayer
    # most norms of Transformer Engine are inside its linear layers; IdentityOp stands for them
    for name in ("input_layernorm", "pre_mlp_layernorm"):
        if getattr(layer.submodules, name) is not IdentityOp:
            setattr(layer.submodules, name, norm)
    attention.core_attention = ModuleSpec(PackedAttention, {"backend": arguments.training.attention_backend})
    if network.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    return layer


def with_bias(linear: type) -> type:
    """Make a class that builds instances of a linear layer with a bias, whatever Megatron-Core asks for.

    Megatron-Core's configuration has one flag for all linear layers but that of queries, keys and values.
    """

    def build(_: type, *args: Any, **named: Any) -> object:
        return linear(*args, **{**named, "bias": True})

    return type(f"{linear.__name__}WithBias", (), {"__new__": build})
