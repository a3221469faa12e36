"""Model families: one file each, one line here.

The first family whose ``refuses`` finds nothing to object to takes the checkpoint.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from mft_megatron.arguments import NetworkArguments
from mft_megatron.convert.row_kinds import RowKind


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight of the checkpoint and its Hugging Face names; ``{}`` in a name stands for the layer."""

    ours: str
    theirs: tuple[str, ...]
    kind: RowKind

    @property
    def in_layers(self) -> bool:
        return self.ours.startswith("decoder.layers.")


@dataclasses.dataclass(frozen=True)
class Family:
    """``rows``: every weight of the family. ``tied_row``: the row that is absent where embeddings are tied.

    ``refuses(architecture)``: why this family cannot express an architecture, or ``None``.
    ``config(architecture, vocab_size, dtype)``: the content of ``config.json``, without token ids.
    """

    name: str
    rows: tuple[Row, ...]
    tied_row: str
    refuses: Callable[[NetworkArguments], str | None]
    config: Callable[[NetworkArguments, int, str], dict[str, Any]]


def all_families() -> tuple[Family, ...]:
    """Every family, in the order they are asked."""
    from mft_megatron.convert.families.llama import LLAMA

    return (LLAMA,)
