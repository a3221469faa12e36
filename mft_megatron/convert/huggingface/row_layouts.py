"""How the rows of one Megatron-Core weight are made of the rows of one or more Hugging Face weights.

::

    linear_qkv   q q q q k v | q q q q k v      blocks: (0, rows 0-4), (1, row 0), (2, row 0), (0, rows 4-8), …
                 │           │                  source 0: q_proj, 1: k_proj, 2: v_proj
                 group 0     group 1

A kind lists the blocks in the order of Megatron-Core's rows. That is all there is to know for both directions, for the
shapes, and for reading a part alone. A checkpoint holds whole weights, whatever layout wrote it, so nothing here knows
about parallelism.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mft_megatron.arguments.groups.network import NetworkArguments

Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Block:
    """``rows`` rows from row ``start`` on of the ``source``-th Hugging Face weight."""

    source: int
    start: int
    rows: int


Blocks = tuple[Block, ...]
RowKind = Callable[[Sizes], Blocks]


def sizes_of(architecture: NetworkArguments, vocab_size: int) -> dict[str, int]:
    """What rows and columns are counted by."""
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


def whole(size: str) -> RowKind:
    """One weight under another name; ``size``: what its rows are counted by."""
    return lambda sizes: (Block(0, 0, sizes[size]),)


def glu(size: str) -> RowKind:
    """Gate above up projection, from two weights."""
    return lambda sizes: (Block(0, 0, sizes[size]), Block(1, 0, sizes[size]))


def qkv(sizes: Sizes) -> Blocks:
    """In groups, one a key/value head: its query heads, the key head, the value head; from three weights."""
    head, groups = sizes["head"], sizes["groups"]
    queries = sizes["heads"] // groups * head
    return tuple(
        block
        for group in range(groups)
        for block in (Block(0, group * queries, queries), Block(1, group * head, head), Block(2, group * head, head))
    )


def qkv_in_groups(sizes: Sizes) -> Blocks:
    """The same order on both sides, in one weight."""
    return (Block(0, 0, (sizes["heads"] + 2 * sizes["groups"]) * sizes["head"]),)


def rows_of(blocks: Blocks) -> int:
    """Rows of the Megatron-Core weight."""
    return sum(block.rows for block in blocks)


def rows_of_sources(blocks: Blocks) -> list[int]:
    """Rows of each Hugging Face weight."""
    count = 1 + max(block.source for block in blocks)
    return [sum(block.rows for block in blocks if block.source == source) for source in range(count)]


def part(blocks: Blocks, first: int, last: int) -> Blocks:
    """The blocks of Megatron-Core's rows ``first`` to before ``last``."""
    found, at = [], 0
    for block in blocks:
        begin, end = max(first - at, 0), min(last - at, block.rows)
        if begin < end:
            found.append(Block(block.source, block.start + begin, end - begin))
        at += block.rows
    return tuple(found)


def split(weight: Tensor, blocks: Blocks) -> list[Tensor]:
    """A Megatron-Core weight -> the Hugging Face weights, each contiguous."""
    pieces = weight.split([block.rows for block in blocks])
    sources: dict[int, list[tuple[int, Tensor]]] = {}
    for block, piece in zip(blocks, pieces, strict=True):
        sources.setdefault(block.source, []).append((block.start, piece))
    return [_joined([piece for _, piece in sorted(sources[source], key=_start)]) for source in sorted(sources)]


def _start(piece: tuple[int, Tensor]) -> int:
    return piece[0]


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(tuple(pieces))
