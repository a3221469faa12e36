"""Weights of this rank filled from anywhere, by their place in a checkpoint: no checkpoint is needed.

What part of each weight is this rank's, the sharded state dict knows; only that is asked for.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .shards import shards_of
from .step import Trainer

# name, (layer, expert) or less, first row and column, shape; of vectors rows alone
Read = Callable[[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]], Tensor]


@torch.no_grad()
def fill_weights(trainer: Trainer, read: Read) -> None:
    """Fill all weights of the model, in place, and the optimizer's copies of them.

    Args:
        read: the content of a part of a weight, of any dtype, on the CPU.
    """
    for shard in (shard for chunk in trainer.chunks for shard in shards_of(chunk.module)):
        stacked = shard.prepend_axis_num
        place, first = shard.global_offset[:stacked], shard.global_offset[stacked:]
        shard.data.copy_(read(shard.key, place, first, tuple(shard.data.shape)))
    trainer.optimizer.reload_model_params()
