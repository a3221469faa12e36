"""GPT-NeoX and Pythia: LayerNorm, GELU, biases at least in the MLP, partly rotated heads, parallel residual."""

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.huggingface.config_entries.activation import Gelu
from mft_megatron.convert.huggingface.config_entries.basic import (
    Biases,
    Fixed,
    Flag,
    RealNumber,
    Vocabulary,
    WholeNumber,
)
from mft_megatron.convert.huggingface.config_entries.heads import Heads
from mft_megatron.convert.huggingface.config_entries.rope import PartialRope
from mft_megatron.convert.huggingface.family import Family
from mft_megatron.convert.huggingface.mapped_weight import MappedWeight
from mft_megatron.convert.huggingface.row_layouts import qkv_in_groups, whole

_LAYER = "decoder.layers."
_HF_LAYER = "gpt_neox.layers.{}."
# names in a checkpoint and in Hugging Face, rows, columns
_ATTENTION = (
    ("self_attention.linear_qkv.", "attention.query_key_value.", qkv_in_groups, "hidden"),
    ("self_attention.linear_proj.", "attention.dense.", whole("hidden"), "attention"),
)
_MLP = (
    ("mlp.linear_fc1.", "mlp.dense_h_to_4h.", whole("ffn"), "hidden"),
    ("mlp.linear_fc2.", "mlp.dense_4h_to_h.", whole("hidden"), "ffn"),
)
_NORMS = (
    (_LAYER + "self_attention.linear_qkv.layer_norm_", _HF_LAYER + "input_layernorm."),
    (_LAYER + "mlp.linear_fc1.layer_norm_", _HF_LAYER + "post_attention_layernorm."),
    ("decoder.final_layernorm.", "gpt_neox.final_layer_norm."),
)


def _weights(architecture: NetworkArguments) -> tuple[MappedWeight, ...]:
    embedding = "embedding.word_embeddings.weight"
    weights = [MappedWeight(embedding, ("gpt_neox.embed_in.weight",), whole("vocab"), "hidden")]
    for linear, has_bias in ((_ATTENTION, architecture.attention_bias), (_MLP, architecture.mlp_bias)):
        for name, hf_name, layout, columns in linear:
            weights.append(MappedWeight(f"{_LAYER}{name}weight", (f"{_HF_LAYER}{hf_name}weight",), layout, columns))
            if has_bias:
                weights.append(MappedWeight(f"{_LAYER}{name}bias", (f"{_HF_LAYER}{hf_name}bias",), layout))
    for name, hf_name in _NORMS:
        weights += [MappedWeight(name + part, (hf_name + part,), whole("hidden")) for part in ("weight", "bias")]
    if not architecture.tie_embeddings:
        weights.append(MappedWeight("output_layer.weight", ("embed_out.weight",), whole("vocab"), "hidden"))
    return tuple(weights)


GPT_NEOX = Family(
    name="GPT-NeoX",
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    weights=_weights,
    entries=(
        Vocabulary(),
        WholeNumber("num_layers", "num_hidden_layers"),
        WholeNumber("hidden_size", "hidden_size"),
        WholeNumber("ffn_hidden_size", "intermediate_size"),
        Fixed(normalization="LayerNorm"),
        Biases("attention_bias", mlp=True, default=True),
        Gelu("hidden_act"),
        RealNumber("norm_epsilon", "layer_norm_eps", 1e-5),
        Heads(has_groups=False),
        WholeNumber("max_position_embeddings", "max_position_embeddings", 2048),
        PartialRope(),
        Flag("parallel_residual", "use_parallel_residual", True),
        Flag("tie_embeddings", "tie_word_embeddings", False),
    ),
)
