"""StarCoder2: LayerNorm, GELU by its tanh approximation, biases everywhere, a sliding window, tied embeddings."""

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.huggingface.config_entries.activation import TANH_GELU
from mft_megatron.convert.huggingface.config_entries.basic import Biases, Fixed, Flag, Only, RealNumber, WholeNumber
from mft_megatron.convert.huggingface.config_entries.heads import Heads
from mft_megatron.convert.huggingface.config_entries.rope import Rope
from mft_megatron.convert.huggingface.config_entries.window import Window
from mft_megatron.convert.huggingface.family import Family
from mft_megatron.convert.huggingface.mapped_weight import MappedWeight
from mft_megatron.convert.huggingface.row_layouts import whole

from .llama import SHAPE, model_weights

_MLP = "decoder.layers.mlp."
_HF_MLP = "model.layers.{}.mlp."


def _weights(architecture: NetworkArguments) -> tuple[MappedWeight, ...]:
    weights = [
        MappedWeight(_MLP + "linear_fc1.weight", (_HF_MLP + "c_fc.weight",), whole("ffn"), "hidden"),
        MappedWeight(_MLP + "linear_fc2.weight", (_HF_MLP + "c_proj.weight",), whole("hidden"), "ffn"),
    ]
    if architecture.mlp_bias:
        weights.append(MappedWeight(_MLP + "linear_fc1.bias", (_HF_MLP + "c_fc.bias",), whole("ffn")))
        weights.append(MappedWeight(_MLP + "linear_fc2.bias", (_HF_MLP + "c_proj.bias",), whole("hidden")))
    return model_weights(architecture, tuple(weights))


STARCODER2 = Family(
    name="StarCoder2",
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    weights=_weights,
    entries=(
        *SHAPE,
        Fixed(normalization="LayerNorm", openai_gelu=True),
        Only("hidden_act", *TANH_GELU),
        Only("mlp_type", "default"),
        Only("norm_type", "layer_norm"),
        RealNumber("norm_epsilon", "norm_epsilon", 1e-5),
        Heads(groups=2),
        WholeNumber("max_position_embeddings", "max_position_embeddings", 4096),
        Rope(),
        Window(default=None),
        Biases("use_bias", "use_bias", default=True),
        Flag("tie_embeddings", "tie_word_embeddings", True),
    ),
)
