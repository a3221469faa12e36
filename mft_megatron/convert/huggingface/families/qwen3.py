"""Qwen3: like Llama, with norms of queries and keys, and a separate head size."""

from mft_megatron.convert.huggingface.config_entries.basic import Biases, Fixed, Flag, RealNumber, WholeNumber
from mft_megatron.convert.huggingface.config_entries.heads import Heads
from mft_megatron.convert.huggingface.config_entries.rope import Rope
from mft_megatron.convert.huggingface.config_entries.window import WindowOfSomeLayers
from mft_megatron.convert.huggingface.family import Family

from .llama import SHAPE, SWIGLU, llama_weights

QWEN3 = Family(
    name="Qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    weights=llama_weights,
    entries=(
        *SHAPE,
        *SWIGLU,
        RealNumber("norm_epsilon", "rms_norm_eps", 1e-6),
        Fixed(qk_layernorm=True),
        Biases("attention_bias", mlp=False),
        Heads(groups=32, head=128),
        WholeNumber("max_position_embeddings", "max_position_embeddings", 32768),
        Rope(),
        WindowOfSomeLayers(),
        Flag("tie_embeddings", "tie_word_embeddings", False),
    ),
)
