"""Llama: RMSNorm, SwiGLU, rotary positions, grouped queries; CodeLlama and DeepSeek-Coder, too."""

from mft_megatron.arguments.groups.network import NetworkArguments
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
from mft_megatron.convert.huggingface.family import Family, Row
from mft_megatron.convert.huggingface.row_layouts import glu, qkv, whole

_LAYER = "decoder.layers."
_THEIRS = "model.layers.{}."
_ATTENTION = _LAYER + "self_attention."

# what models after Llama call alike
SHAPE: tuple[Entry, ...] = (
    Vocabulary(),
    WholeNumber("num_layers", "num_hidden_layers"),
    WholeNumber("hidden_size", "hidden_size"),
    WholeNumber("ffn_hidden_size", "intermediate_size"),
)
GATED: tuple[Entry, ...] = (
    Fixed(normalization="RMSNorm", swiglu=True),
    Only("hidden_act", "silu", "swish"),
    RealNumber("norm_epsilon", "rms_norm_eps", 1e-6),
)


def attention_rows(architecture: NetworkArguments) -> tuple[Row, ...]:
    """Attention of a layer, without its norm."""
    names = tuple(f"{_THEIRS}self_attn.{name}_proj" for name in "qkv")
    rows = [Row(_ATTENTION + "linear_qkv.weight", tuple(f"{name}.weight" for name in names), qkv, "hidden")]
    if architecture.add_bias_linear or architecture.add_qkv_bias:
        rows.append(Row(_ATTENTION + "linear_qkv.bias", tuple(f"{name}.bias" for name in names), qkv))
    for norm in "qk" if architecture.qk_layernorm else "":
        theirs = (f"{_THEIRS}self_attn.{norm}_norm.weight",)
        rows.append(Row(f"{_ATTENTION}{norm}_layernorm.weight", theirs, whole("head")))
    out = _THEIRS + "self_attn.o_proj."
    rows.append(Row(_ATTENTION + "linear_proj.weight", (out + "weight",), whole("hidden"), "attention"))
    if architecture.add_bias_linear:
        rows.append(Row(_ATTENTION + "linear_proj.bias", (out + "bias",), whole("hidden")))
    return tuple(rows)


def gated_rows(architecture: NetworkArguments) -> tuple[Row, ...]:
    """The MLP of a layer, without its norm."""
    up = (_THEIRS + "mlp.gate_proj.", _THEIRS + "mlp.up_proj.")
    down = _THEIRS + "mlp.down_proj."
    rows = [Row(_LAYER + "mlp.linear_fc1.weight", tuple(f"{name}weight" for name in up), glu("ffn"), "hidden")]
    if architecture.add_bias_linear:
        rows.append(Row(_LAYER + "mlp.linear_fc1.bias", tuple(f"{name}bias" for name in up), glu("ffn")))
    rows.append(Row(_LAYER + "mlp.linear_fc2.weight", (down + "weight",), whole("hidden"), "ffn"))
    if architecture.add_bias_linear:
        rows.append(Row(_LAYER + "mlp.linear_fc2.bias", (down + "bias",), whole("hidden")))
    return tuple(rows)


def model_rows(
    architecture: NetworkArguments, mlp: tuple[Row, ...], before_mlp: str = _LAYER + "mlp.linear_fc1.layer_norm_"
) -> tuple[Row, ...]:
    """A whole model around an MLP.

    Args:
        before_mlp: what the checkpoint's names of the norm before it begin with.
    """
    kinds = ("weight",) if architecture.normalization == "RMSNorm" else ("weight", "bias")

    def norm(ours: str, theirs: str) -> list[Row]:
        return [Row(ours + kind, (theirs + kind,), whole("hidden")) for kind in kinds]

    rows = [
        Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), whole("vocab"), "hidden"),
        *norm(_ATTENTION + "linear_qkv.layer_norm_", _THEIRS + "input_layernorm."),
        *attention_rows(architecture),
        *norm(before_mlp, _THEIRS + "post_attention_layernorm."),
        *mlp,
        *norm("decoder.final_layernorm.", "model.norm."),
    ]
    if not architecture.tie_embeddings:
        rows.append(Row("output_layer.weight", ("lm_head.weight",), whole("vocab"), "hidden"))
    return tuple(rows)


def llama_rows(architecture: NetworkArguments) -> tuple[Row, ...]:
    """Every weight of a model with gated units."""
    return model_rows(architecture, gated_rows(architecture))


LLAMA = Family(
    name="Llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    rows=llama_rows,
    entries=(
        *SHAPE,
        *GATED,
        Heads(),
        WholeNumber("max_position_embeddings", "max_position_embeddings", 2048),
        Rope(),
        Biases("attention_bias", "mlp_bias"),
        Flag("tie_embeddings", "tie_word_embeddings", False),
    ),
)
