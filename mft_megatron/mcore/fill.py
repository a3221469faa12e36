"""Weights of this rank filled from anywhere, by their place in a checkpoint: no checkpoint is needed.

What part of each weight is this rank's, the sharded state dict knows; only that is asked for.
"""

from collections.abc import Callable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from .step import Trainer

# name, (layer, expert) or less, first row and column, shape; of vectors rows alone
Read = Callable[[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]], Tensor]


@torch.no_grad()
def fill_weights(trainer: Trainer, read: Read) -> None:
    """Fill all weights of the model, in place, and the optimizer's copies of them.

    Args:
        read: the content of a part of a weight, of any dtype, on the CPU.
    """
    for chunk in trainer.chunks:
        for entry in chunk.module.sharded_state_dict().values():
            for shard in _shards(entry):
                stacked = shard.prepend_axis_num
                place, first = shard.global_offset[:stacked], shard.global_offset[stacked:]
                shard.data.copy_(read(shard.key, place, first, tuple(shard.data.shape)))
    trainer.optimizer.reload_model_params()


def _shards(entry: object) -> list[ShardedTensor]:
    """The parts of an entry, each a view of the parameter: a factory has one for gate and up projection each."""
    if isinstance(entry, ShardedTensorFactory):
        parts = entry.build()
        return parts if isinstance(parts, list) else list(parts.values())
    return [entry] if isinstance(entry, ShardedTensor) else []
