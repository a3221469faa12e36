"""Check the model's shape, and that it can be divided over tensor-parallel ranks."""

from mft_megatron.arguments.table import Arguments


def check_heads(a: Arguments) -> str | None:
    """Check the sizes of heads and MLP."""
    n, tp = a.network, a.distributed.tensor_model_parallel_size
    if n.num_attention_heads * n.kv_channels != n.hidden_size and n.hidden_size % n.num_attention_heads:
        return (
            f"--hidden-size {n.hidden_size} is not divisible by --num-attention-heads {n.num_attention_heads}; change "
            "one of them or give --kv-channels"
        )
    if n.kv_channels % 2 and n.position_embedding_type == "rope":
        return f"--kv-channels {n.kv_channels}: rope needs an even head size"
    if n.num_attention_heads % n.num_query_groups:
        return f"--num-query-groups {n.num_query_groups} does not divide --num-attention-heads {n.num_attention_heads}"
    if n.num_attention_heads % tp:
        return (
            f"--tensor-model-parallel-size {tp} does not divide --num-attention-heads {n.num_attention_heads}; use a "
            "divisor of the number of heads"
        )
    if n.num_query_groups % tp:
        return (
            f"--tensor-model-parallel-size {tp} does not divide --num-query-groups {n.num_query_groups}; use a divisor "
            "of the number of groups"
        )
    if n.ffn_hidden_size % tp:
        return f"--tensor-model-parallel-size {tp} does not divide --ffn-hidden-size {n.ffn_hidden_size}"
    return None


def check_activation(a: Arguments) -> str | None:
    """Check that one activation function is chosen."""
    n = a.network
    kinds = {"--swiglu": n.swiglu, "--squared-relu": n.squared_relu, "--openai-gelu": n.openai_gelu}
    given = [name for name, chosen in kinds.items() if chosen]
    if len(given) > 1:
        return f"{' and '.join(given)} all set the activation function of the MLP; give one of them"
    if n.swiglu and n.gated_linear_unit:
        return "--swiglu is a gated linear unit, with SiLU; leave --gated-linear-unit out"
    return None


def check_positions(a: Arguments) -> str | None:
    """Check position embeddings against the sequence length, and their scaling."""
    if a.data.seq_length > a.network.max_position_embeddings:
        return (
            f"--seq-length {a.data.seq_length} is longer than --max-position-embeddings "
            f"{a.network.max_position_embeddings}; raise the latter or pack the data for a shorter length"
        )
    scaling, factor = a.network.scaling, a.network.rotary_seq_len_interpolation_factor
    if scaling is not None and factor is not None:
        return (
            f"--rotary-seq-len-interpolation-factor {factor} and --rope-scaling both scale positions; give one of them"
        )
    if scaling is not None and a.network.position_embedding_type != "rope":
        return "--rope-scaling has no effect without --position-embedding-type rope; give both or neither"
    if scaling is not None and scaling.rope_type == "yarn" and a.network.rotary_percent < 1:
        return (
            f"--rope-scaling: yarn scales attention scores as a whole, and --rotary-percent {a.network.rotary_percent} "
            "rotates a part of each head; use linear or llama3"
        )
    return None
