"""How one weight of a Megatron-Core checkpoint becomes one or more Hugging Face weights.

A checkpoint holds whole weights, whatever layout wrote it, so nothing here knows about parallelism. A kind is a
function ``(weight, architecture, vocab_size) -> weights in the order of the row's names``.
"""

from collections.abc import Callable

from torch import Tensor

from mft_megatron.arguments import NetworkArguments

RowKind = Callable[[Tensor, NetworkArguments, int], tuple[Tensor, ...]]


def direct(weight: Tensor, architecture: NetworkArguments, vocab_size: int) -> tuple[Tensor, ...]:
    """The same weight under another name."""
    return (weight,)


def vocab(weight: Tensor, architecture: NetworkArguments, vocab_size: int) -> tuple[Tensor, ...]:
    """[padded vocabulary, ...] without the rows that only pad."""
    return (weight[:vocab_size],)


def glu(weight: Tensor, architecture: NetworkArguments, vocab_size: int) -> tuple[Tensor, ...]:
    """[2 · ffn, ...]: gate projection above up projection -> gate, up."""
    return tuple(weight.chunk(2))


def qkv(weight: Tensor, architecture: NetworkArguments, vocab_size: int) -> tuple[Tensor, ...]:
    """Rows in groups, one a key/value head: its query heads, the key head, the value head -> query, key, value."""
    groups, size = architecture.num_query_groups, architecture.kv_channels
    queries = architecture.num_attention_heads // groups
    grouped = weight.view(groups, queries + 2, size, *weight.shape[1:])
    parts = grouped.split((queries, 1, 1), dim=1)
    return tuple(part.reshape(-1, *weight.shape[1:]) for part in parts)
