"""Mistral: like Llama, with a sliding window."""

from mft_megatron.convert.huggingface.config_entries.basic import Fixed, Flag, RealNumber, WholeNumber
from mft_megatron.convert.huggingface.config_entries.heads import Heads
from mft_megatron.convert.huggingface.config_entries.rope import Rope
from mft_megatron.convert.huggingface.config_entries.window import Window
from mft_megatron.convert.huggingface.family import Family

from .llama import SHAPE, SWIGLU, llama_weights

MISTRAL = Family(
    name="Mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    weights=llama_weights,
    entries=(
        *SHAPE,
        *SWIGLU,
        RealNumber("norm_epsilon", "rms_norm_eps", 1e-6),
        Fixed(add_bias_linear=False),
        Heads(groups=8),
        WholeNumber("max_position_embeddings", "max_position_embeddings", 131072),
        Rope(),
        Window(default=4096),
        Flag("tie_embeddings", "tie_word_embeddings", False),
    ),
)
