"""Row layouts: how the rows of one Megatron-Core weight are made of the rows of one or more Hugging Face weights.

::

    linear_qkv   q q q q k v | q q q q k v      blocks: (0, rows 0-4), (1, row 0), (2, row 0), (0, rows 4-8), …
                 │           │                  source 0: q_proj, 1: k_proj, 2: v_proj
                 group 0     group 1

A layout lists the blocks in the order of Megatron-Core's rows. That is enough for both directions, for the shapes, and
for reading some rows alone. A checkpoint holds whole weights at every parallel layout, so nothing here knows about
parallelism.
"""

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mft_megatron.arguments.groups.network import NetworkArguments

Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive rows of one Hugging Face weight.

    Attributes:
        source: index of the Hugging Face weight.
        start: first row in that weight.
        rows: number of rows.
    """

    source: int
    start: int
    rows: int


Blocks = tuple[Block, ...]
RowLayout = Callable[[Sizes], Blocks]


def sizes_of(architecture: NetworkArguments, vocab_size: int) -> dict[str, int]:
    """Sizes of rows and columns by the keys that layouts use.

    Args:
        vocab_size: tokens, without padding.
    """
    a = architecture
    return {
        "vocab": vocab_size,
        "hidden": a.hidden_size,
        "ffn": a.ffn_hidden_size,
        "expert ffn": a.moe_ffn_hidden_size or a.ffn_hidden_size,
        "experts": a.num_experts or 0,
        "head": a.kv_channels,
        "heads": a.num_attention_heads,
        "groups": a.num_query_groups,
        "attention": a.num_attention_heads * a.kv_channels,
    }


def whole(size: str) -> RowLayout:
    """One Hugging Face weight, with the same rows; ``size``: key of their number."""
    return lambda sizes: (Block(0, 0, sizes[size]),)


def glu(size: str) -> RowLayout:
    """Gate projection above up projection, from two weights; ``size``: key of the rows of each."""
    return lambda sizes: (Block(0, 0, sizes[size]), Block(1, 0, sizes[size]))


def qkv(sizes: Sizes) -> Blocks:
    """For each key/value head its query heads, the key head and the value head, from three weights."""
    head, groups = sizes["head"], sizes["groups"]
    queries = sizes["heads"] // groups * head
    return tuple(
        block
        for group in range(groups)
        for block in (Block(0, group * queries, queries), Block(1, group * head, head), Block(2, group * head, head))
    )


def qkv_in_groups(sizes: Sizes) -> Blocks:
    """The order of :func:`qkv` in one Hugging Face weight."""
    return (Block(0, 0, (sizes["heads"] + 2 * sizes["groups"]) * sizes["head"]),)


def rows_of(blocks: Blocks) -> int:
    """Rows of the Megatron-Core weight."""
    return sum(block.rows for block in blocks)


def rows_of_sources(blocks: Blocks) -> list[int]:
    """Rows of each Hugging Face weight."""
    count = 1 + max(block.source for block in blocks)
    return [sum(block.rows for block in blocks if block.source == source) for source in range(count)]


def slice_blocks(blocks: Blocks, first: int, last: int) -> Blocks:
    """Blocks of the Megatron-Core rows from ``first`` to before ``last``."""
    sliced, position = [], 0
    for block in blocks:
        begin, end = max(first - position, 0), min(last - position, block.rows)
        if begin < end:
            sliced.append(Block(block.source, block.start + begin, end - begin))
        position += block.rows
    return tuple(sliced)


def split(weight: Tensor, blocks: Blocks) -> list[Tensor]:
    """Split a Megatron-Core weight [rows, …] into the Hugging Face weights, each contiguous."""
    sources: dict[int, dict[int, Tensor]] = {}
    for block, rows in zip(blocks, weight.split([block.rows for block in blocks]), strict=True):
        sources.setdefault(block.source, {})[block.start] = rows
    return [_concatenated([rows for _, rows in sorted(sources[source].items())]) for source in sorted(sources)]


def _concatenated(slices: list[Tensor]) -> Tensor:
    # a single slice need not be copied where it is contiguous
    return slices[0].contiguous() if len(slices) == 1 else torch.cat(slices)
