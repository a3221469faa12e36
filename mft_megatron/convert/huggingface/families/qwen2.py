"""Qwen2, Qwen2.5 and Qwen2.5-Coder: like Llama, with biases in the projections of queries, keys and values."""

from mft_megatron.convert.huggingface.config_entries.basic import Fixed, Flag, RealNumber, WholeNumber
from mft_megatron.convert.huggingface.config_entries.heads import Heads
from mft_megatron.convert.huggingface.config_entries.rope import Rope
from mft_megatron.convert.huggingface.config_entries.window import WindowOfSomeLayers
from mft_megatron.convert.huggingface.family import Family

from .llama import SHAPE, SWIGLU, llama_weights

QWEN2 = Family(
    name="Qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    weights=llama_weights,
    entries=(
        *SHAPE,
        *SWIGLU,
        RealNumber("norm_epsilon", "rms_norm_eps", 1e-6),
        Fixed(add_bias_linear=False, add_qkv_bias=True),
        Heads(groups=32),
        WholeNumber("max_position_embeddings", "max_position_embeddings", 32768),
        Rope(),
        WindowOfSomeLayers(),
        Flag("tie_embeddings", "tie_word_embeddings", False),
    ),
)
