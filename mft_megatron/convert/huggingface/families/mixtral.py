"""Mixtral: Mistral with a mixture of experts in place of each MLP."""

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.huggingface.config_entries.basic import Fixed, Flag, RealNumber, WholeNumber
from mft_megatron.convert.huggingface.config_entries.heads import Heads
from mft_megatron.convert.huggingface.config_entries.rope import Rope
from mft_megatron.convert.huggingface.config_entries.window import Window
from mft_megatron.convert.huggingface.family import Family, Row
from mft_megatron.convert.huggingface.row_layouts import glu, whole

from .llama import GATED, SHAPE, model_rows

_OURS = "decoder.layers.mlp."
_THEIRS = "model.layers.{}.block_sparse_moe."
_EXPERT = _THEIRS + "experts.{}."


def _rows(architecture: NetworkArguments) -> tuple[Row, ...]:
    up = (_EXPERT + "w1.weight", _EXPERT + "w3.weight")
    mlp = (
        Row(_OURS + "router.weight", (_THEIRS + "gate.weight",), whole("experts"), "hidden"),
        Row(_OURS + "experts.experts.linear_fc1.weight", up, glu("expert ffn"), "hidden"),
        Row(_OURS + "experts.experts.linear_fc2.weight", (_EXPERT + "w2.weight",), whole("hidden"), "expert ffn"),
    )
    return model_rows(architecture, mlp, before_mlp="decoder.layers.pre_mlp_layernorm.")


MIXTRAL = Family(
    name="Mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    rows=_rows,
    entries=(
        *SHAPE,
        *GATED[:2],
        RealNumber("norm_epsilon", "rms_norm_eps", 1e-5),
        Fixed(add_bias_linear=False),
        WholeNumber("num_experts", "num_local_experts", 8),
        WholeNumber("moe_router_topk", "num_experts_per_tok", 2),
        Heads(groups=8),
        WholeNumber("max_position_embeddings", "max_position_embeddings", 131072),
        Rope(theta=1000000.0),
        Window(default=None),
        Flag("tie_embeddings", "tie_word_embeddings", False),
    ),
)
