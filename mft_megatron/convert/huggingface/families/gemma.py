"""Gemma and CodeGemma: like Llama, with GELU in the gate, scaled embeddings, norms stored less 1, a separate head size.

Gemma 2 and 3 are other architectures: they also normalise the outputs of attention and MLP, and cap or mix attention.
"""

from mft_megatron.convert.huggingface.config_entries.activation import TanhGelu
from mft_megatron.convert.huggingface.config_entries.basic import Biases, Fixed, Flag, Only, RealNumber, WholeNumber
from mft_megatron.convert.huggingface.config_entries.heads import Heads
from mft_megatron.convert.huggingface.config_entries.rope import Rope
from mft_megatron.convert.huggingface.family import Family

from .llama import SHAPE, llama_weights

GEMMA = Family(
    name="Gemma",
    model_type="gemma",
    architecture="GemmaForCausalLM",
    weights=llama_weights,
    entries=(
        *SHAPE,
        Fixed(
            normalization="RMSNorm",
            apply_layernorm_1p=True,
            gated_linear_unit=True,
            scale_embeddings_by_hidden_size=True,
        ),
        TanhGelu("hidden_act", "hidden_activation"),
        RealNumber("norm_epsilon", "rms_norm_eps", 1e-6),
        Biases("attention_bias", mlp=False),
        Only("use_bidirectional_attention", False, None),
        Heads(groups=16, head=256),
        WholeNumber("max_position_embeddings", "max_position_embeddings", 8192),
        Rope(),
        Flag("tie_embeddings", "tie_word_embeddings", True),
    ),
)
