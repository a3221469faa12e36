"""This rank's shards of a model's weights, each with its offset in the checkpoint's tensor."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from collections.abc import Iterable, Iterator
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule


def shards_of(model: MegatronModule) -> Iterator[ShardedTensor]:
    """Yield the shards of all weights of a module; ``data`` of each is a view of the parameter.

    A parameter that consists of several tensors of the checkpoint (gate and up projection) yields a shard of each.
    """
    yield from shards_in(model.sharded_state_dict().values())


def shards_in(entries: Iterable[Any]) -> Iterator[ShardedTensor]:
    """Yield the shards of the weights among entries of a sharded state dict, which may be of other types too."""
    for entry in entries:
        if isinstance(entry, ShardedTensorFactory):
            parts = entry.build()
            yield from parts if isinstance(parts, list) else parts.values()
        elif isinstance(entry, ShardedTensor):
            yield entry
