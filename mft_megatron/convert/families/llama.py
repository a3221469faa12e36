"""Llama: RMSNorm, SwiGLU, rotary positions, grouped queries, no biases."""

from typing import Any

from mft_megatron.arguments import NetworkArguments
from mft_megatron.convert.families import Family, Row
from mft_megatron.convert.row_kinds import direct, glu, qkv, vocab

_LAYER = "decoder.layers."
_THEIRS = "model.layers.{}."


def _refuses(architecture: NetworkArguments) -> str | None:
    wanted = {
        "normalization": "RMSNorm",
        "swiglu": True,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
    }
    for name, value in wanted.items():
        if getattr(architecture, name) != value:
            return f"{name} is {getattr(architecture, name)}, Llama has {value}"
    return None


def _config(architecture: NetworkArguments, vocab_size: int, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_query_groups,
        "head_dim": architecture.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": architecture.max_position_embeddings,
        "rms_norm_eps": architecture.norm_epsilon,
        # transformers 4 reads the first spelling and ignores the second; transformers 5 the other way round
        "rope_theta": float(architecture.rotary_base),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(architecture.rotary_base)},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": architecture.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
    }


LLAMA = Family(
    name="Llama",
    rows=(
        Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocab),
        Row(
            _LAYER + "self_attention.linear_qkv.layer_norm_weight",
            (_THEIRS + "input_layernorm.weight",),
            direct,
        ),
        Row(
            _LAYER + "self_attention.linear_qkv.weight",
            tuple(f"{_THEIRS}self_attn.{name}_proj.weight" for name in "qkv"),
            qkv,
        ),
        Row(_LAYER + "self_attention.linear_proj.weight", (_THEIRS + "self_attn.o_proj.weight",), direct),
        Row(_LAYER + "mlp.linear_fc1.layer_norm_weight", (_THEIRS + "post_attention_layernorm.weight",), direct),
        Row(
            _LAYER + "mlp.linear_fc1.weight",
            (_THEIRS + "mlp.gate_proj.weight", _THEIRS + "mlp.up_proj.weight"),
            glu,
        ),
        Row(_LAYER + "mlp.linear_fc2.weight", (_THEIRS + "mlp.down_proj.weight",), direct),
        Row("decoder.final_layernorm.weight", ("model.norm.weight",), direct),
        Row("output_layer.weight", ("lm_head.weight",), vocab),
    ),
    tied_row="output_layer.weight",
    refuses=_refuses,
    config=_config,
)
