"""Qwen2, Qwen2.5 and Qwen2.5-Coder: like Llama, with biases of queries, keys and values."""

from mft_megatron.convert.huggingface.config_entries import Fixed, Flag, Heads, Number, Rope, WindowOfSomeLayers
from mft_megatron.convert.huggingface.family import Family

from .llama import GATED, SHAPE, llama_rows

QWEN2 = Family(
    name="Qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    rows=llama_rows,
    entries=(
        *SHAPE,
        *GATED,
        Fixed(add_bias_linear=False, add_qkv_bias=True),
        Heads(groups=32),
        Number("max_position_embeddings", "max_position_embeddings", 32768),
        Rope(),
        WindowOfSomeLayers(),
        Flag("tie_embeddings", "tie_word_embeddings", False),
    ),
)
