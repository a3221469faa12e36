"""The model's shape."""

import dataclasses

from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class NetworkArguments:
    """The model's shape. With --load it comes from the checkpoint and need not be given."""

    num_layers: int | None = option(None, "Number of transformer layers.", type=int, at_least=1)
    hidden_size: int | None = option(None, "Size of the hidden states.", type=int, at_least=1)
    ffn_hidden_size: int | None = option(
        None,
        "Size of the MLP. Not given: 4 × hidden size, or 2/3 of that in steps of 64 with --swiglu.",
        type=int,
        at_least=1,
    )
    num_attention_heads: int | None = option(None, "Number of attention heads.", type=int, at_least=1)
    group_query_attention: bool = option(False, "Grouped-query attention.")
    num_query_groups: int = option(1, "Key/value heads of --group-query-attention.", at_least=1)
    kv_channels: int | None = option(
        None, "Size of a head. Not given: hidden size / attention heads.", type=int, at_least=1
    )
    max_position_embeddings: int | None = option(
        None, "Longest sequence the model is made for. Not given: --seq-length.", type=int, at_least=1
    )
    position_embedding_type: str = option(
        "learned_absolute",
        "Position embedding. Megatron's default is not what code LLMs use: they want rope.",
        choices=("learned_absolute", "rope", "none"),
    )
    rotary_base: int = option(10000, "Base of the rotary frequencies.", at_least=2)
    rotary_percent: float = option(1.0, "Share of each head that is rotated.", above=0, at_most=1)
    normalization: str = option("LayerNorm", "Normalisation layers.", choices=("LayerNorm", "RMSNorm"))
    norm_epsilon: float = option(1e-5, "Epsilon of the normalisation layers.", above=0)
    swiglu: bool = option(False, "Gated linear units with SiLU in the MLP instead of GELU.")
    add_bias_linear: bool = option(True, "No bias in the linear layers.", flag="--disable-bias-linear")
    add_qkv_bias: bool = option(False, "Bias in the query/key/value projection only.")
    qk_layernorm: bool = option(False, "Normalise queries and keys.")
    tie_embeddings: bool = option(
        True,
        "Output layer with weights of its own; by default it shares the embedding's.",
        flag="--untie-embeddings-and-output-weights",
    )
    make_vocab_size_divisible_by: int = option(
        128,
        "The vocabulary is padded to a multiple of this times the tensor-parallel size. Unlike in Megatron, padded "
        "rows are left out of the softmax, so that the padding does not change the loss.",
        at_least=1,
    )
