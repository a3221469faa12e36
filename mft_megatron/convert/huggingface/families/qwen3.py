"""Qwen3: like Llama, with norms of queries and keys, and heads of their own size."""

from mft_megatron.convert.huggingface.config_entries.basic import Fixed, Flag, Only, WholeNumber
from mft_megatron.convert.huggingface.config_entries.heads import Heads
from mft_megatron.convert.huggingface.config_entries.rope import Rope
from mft_megatron.convert.huggingface.config_entries.window import WindowOfSomeLayers
from mft_megatron.convert.huggingface.family import Family

from .llama import GATED, SHAPE, llama_rows

QWEN3 = Family(
    name="Qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    rows=llama_rows,
    entries=(
        *SHAPE,
        *GATED,
        Fixed(add_bias_linear=False, qk_layernorm=True),
        Only("attention_bias", False),
        Heads(groups=32, head=128),
        WholeNumber("max_position_embeddings", "max_position_embeddings", 32768),
        Rope(),
        WindowOfSomeLayers(),
        Flag("tie_embeddings", "tie_word_embeddings", False),
    ),
)
