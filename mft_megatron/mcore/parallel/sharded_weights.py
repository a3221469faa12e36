"""This rank's parts of a model's weights, and where in the checkpoint each of them lies."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory


def shards_of(model: torch.nn.Module) -> Iterator[ShardedTensor]:
    """Of all weights of a module of Megatron-Core's; ``data`` of each is a view of the parameter.

    A parameter that is several pieces of the checkpoint (gate and up projection) yields each of them.
    """
    yield from shards_in(model.sharded_state_dict().values())


def shards_in(entries: Iterable[Any]) -> Iterator[ShardedTensor]:
    """Of the weights among entries of a sharded state dict."""
    for entry in entries:
        if isinstance(entry, ShardedTensorFactory):
            parts = entry.build()
            yield from parts if isinstance(parts, list) else parts.values()
        elif isinstance(entry, ShardedTensor):
            yield entry
