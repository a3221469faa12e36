"""Llama: RMSNorm, SwiGLU, rotary positions, grouped queries; also CodeLlama and DeepSeek-Coder.

Later families share these tables, since most of their weights and entries have the same names.
"""

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.huggingface.config_entries.activation import SILU
from mft_megatron.convert.huggingface.config_entries.basic import (
    Biases,
    Fixed,
    Flag,
    Only,
    RealNumber,
    Vocabulary,
    WholeNumber,
)
from mft_megatron.convert.huggingface.config_entries.entry import Entry
from mft_megatron.convert.huggingface.config_entries.heads import Heads
from mft_megatron.convert.huggingface.config_entries.rope import Rope
from mft_megatron.convert.huggingface.family import Family
from mft_megatron.convert.huggingface.mapped_weight import MappedWeight
from mft_megatron.convert.huggingface.row_layouts import glu, qkv, whole

_LAYER = "decoder.layers."
_HF_LAYER = "model.layers.{}."
_ATTENTION = _LAYER + "self_attention."

SHAPE: tuple[Entry, ...] = (
    Vocabulary(),
    WholeNumber("num_layers", "num_hidden_layers"),
    WholeNumber("hidden_size", "hidden_size"),
    WholeNumber("ffn_hidden_size", "intermediate_size"),
)
SWIGLU: tuple[Entry, ...] = (
    Fixed(normalization="RMSNorm", swiglu=True),
    Only("hidden_act", *SILU),
)


def attention_weights(architecture: NetworkArguments) -> tuple[MappedWeight, ...]:
    """Weights of attention in a layer, without the norm before it."""
    hf_qkv = tuple(f"{_HF_LAYER}self_attn.{name}_proj" for name in "qkv")
    hf_out = _HF_LAYER + "self_attn.o_proj"
    weights = [
        MappedWeight(_ATTENTION + "linear_qkv.weight", tuple(f"{name}.weight" for name in hf_qkv), qkv, "hidden")
    ]
    if architecture.qkv_bias:
        weights.append(MappedWeight(_ATTENTION + "linear_qkv.bias", tuple(f"{name}.bias" for name in hf_qkv), qkv))
    for norm in "qk" if architecture.qk_layernorm else "":
        hf_norm = f"{_HF_LAYER}self_attn.{norm}_norm.weight"
        weights.append(MappedWeight(f"{_ATTENTION}{norm}_layernorm.weight", (hf_norm,), whole("head")))
    weights.append(MappedWeight(_ATTENTION + "linear_proj.weight", (hf_out + ".weight",), whole("hidden"), "attention"))
    if architecture.attention_bias:
        weights.append(MappedWeight(_ATTENTION + "linear_proj.bias", (hf_out + ".bias",), whole("hidden")))
    return tuple(weights)


def gated_weights(architecture: NetworkArguments) -> tuple[MappedWeight, ...]:
    """Weights of the gated MLP of a layer, without the norm before it."""
    fc1, fc2 = _LAYER + "mlp.linear_fc1.", _LAYER + "mlp.linear_fc2."
    gate, up, down = (f"{_HF_LAYER}mlp.{name}_proj." for name in ("gate", "up", "down"))
    weights = [MappedWeight(fc1 + "weight", (gate + "weight", up + "weight"), glu("ffn"), "hidden")]
    if architecture.mlp_bias:
        weights.append(MappedWeight(fc1 + "bias", (gate + "bias", up + "bias"), glu("ffn")))
    weights.append(MappedWeight(fc2 + "weight", (down + "weight",), whole("hidden"), "ffn"))
    if architecture.mlp_bias:
        weights.append(MappedWeight(fc2 + "bias", (down + "bias",), whole("hidden")))
    return tuple(weights)


def model_weights(
    architecture: NetworkArguments,
    mlp: tuple[MappedWeight, ...],
    norm_before_mlp: str = _LAYER + "mlp.linear_fc1.layer_norm_",
) -> tuple[MappedWeight, ...]:
    """Every weight of a model.

    Args:
        mlp: weights of the MLP of a layer, without the norm before it.
        norm_before_mlp: beginning of that norm's names in a checkpoint.
    """
    endings = ("weight",) if architecture.normalization == "RMSNorm" else ("weight", "bias")

    def norm(name: str, hf_name: str) -> list[MappedWeight]:
        return [MappedWeight(name + ending, (hf_name + ending,), whole("hidden")) for ending in endings]

    weights = [
        MappedWeight("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), whole("vocab"), "hidden"),
        *norm(_ATTENTION + "linear_qkv.layer_norm_", _HF_LAYER + "input_layernorm."),
        *attention_weights(architecture),
        *norm(norm_before_mlp, _HF_LAYER + "post_attention_layernorm."),
        *mlp,
        *norm("decoder.final_layernorm.", "model.norm."),
    ]
    if not architecture.tie_embeddings:
        weights.append(MappedWeight("output_layer.weight", ("lm_head.weight",), whole("vocab"), "hidden"))
    return tuple(weights)


def llama_weights(architecture: NetworkArguments) -> tuple[MappedWeight, ...]:
    """Every weight of a model with gated MLPs."""
    return model_weights(architecture, gated_weights(architecture))


LLAMA = Family(
    name="Llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    weights=llama_weights,
    entries=(
        *SHAPE,
        *SWIGLU,
        RealNumber("norm_epsilon", "rms_norm_eps", 1e-6),
        Heads(),
        WholeNumber("max_position_embeddings", "max_position_embeddings", 2048),
        Rope(),
        Biases("attention_bias", "mlp_bias"),
        Flag("tie_embeddings", "tie_word_embeddings", False),
    ),
)
