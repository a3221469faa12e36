"""Mixtral: like Mistral, with a mixture of experts instead of each MLP."""

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.huggingface.config_entries.basic import Fixed, Flag, RealNumber, WholeNumber
from mft_megatron.convert.huggingface.config_entries.heads import Heads
from mft_megatron.convert.huggingface.config_entries.rope import Rope
from mft_megatron.convert.huggingface.config_entries.window import Window
from mft_megatron.convert.huggingface.family import Family
from mft_megatron.convert.huggingface.mapped_weight import MappedWeight
from mft_megatron.convert.huggingface.row_layouts import glu, whole

from .llama import SHAPE, SWIGLU, model_weights

_MLP = "decoder.layers.mlp."
_HF_MLP = "model.layers.{}.block_sparse_moe."
_HF_EXPERT = _HF_MLP + "experts.{}."


def _weights(architecture: NetworkArguments) -> tuple[MappedWeight, ...]:
    gate, up, down = (f"{_HF_EXPERT}{name}.weight" for name in ("w1", "w3", "w2"))
    mlp = (
        MappedWeight(_MLP + "router.weight", (_HF_MLP + "gate.weight",), whole("experts"), "hidden"),
        MappedWeight(_MLP + "experts.experts.linear_fc1.weight", (gate, up), glu("expert ffn"), "hidden"),
        MappedWeight(_MLP + "experts.experts.linear_fc2.weight", (down,), whole("hidden"), "expert ffn"),
    )
    return model_weights(architecture, mlp, norm_before_mlp="decoder.layers.pre_mlp_layernorm.")


MIXTRAL = Family(
    name="Mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    weights=_weights,
    entries=(
        *SHAPE,
        *SWIGLU,
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
