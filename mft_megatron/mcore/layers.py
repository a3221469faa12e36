"""What the layers are made of: Megatron-Core's layer specification with this project's norms and attention."""

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from mft_megatron.arguments import NetworkArguments

from .attention import PackedAttention
from .norm import NORMS


def block_spec(
    config: TransformerConfig, network: NetworkArguments, virtual_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this rank's stage, or of its ``virtual_stage``-th."""
    norm = NORMS[network.normalization]
    layer = get_gpt_layer_local_spec(qk_layernorm=network.qk_layernorm, normalization=network.normalization)
    layer.submodules.input_layernorm = norm
    layer.submodules.pre_mlp_layernorm = norm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if network.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    layers = [layer] * get_num_layers_to_build(config, virtual_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)
