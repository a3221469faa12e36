"""Weights of this rank filled from anywhere, by their place in a checkpoint: no checkpoint is needed.

What part of each weight is this rank's, the sharded state dict knows; only that is asked for. Of weights that are kept
in 4 bits there is one at a time in memory.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from collections.abc import Callable, Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from mft_megatron.lora import is_adapter
from mft_megatron.mcore.adapters.quantized_linear import quantized_parts
from mft_megatron.mcore.parallel.sharded_weights import shards_of
from mft_megatron.mcore.trainer import Trainer

# name, (layer, expert) or less, first row and column, shape; of vectors rows alone
Read = Callable[[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]], Tensor]


def fill_weights(trainer: Trainer, read: Read, adapters: bool = False) -> None:
    """Fill the weights of the trainer's model as :func:`fill_model` does, and the optimizer's copies of them."""
    for chunk in trainer.chunks:
        fill_model(chunk.module, read, adapters)
    trainer.optimizer.reload_model_params()


@torch.no_grad()
def fill_model(model: GPTModel, read: Read, adapters: bool = False) -> None:
    """Fill the weights of a model, in place.

    Args:
        model: this rank's, or a stage of it.
        read: the content of a part of a weight, of any dtype, on the CPU.
        adapters: those of the adapters, or all others.
    """
    for shard in shards_of(model):
        if is_adapter(shard.key) == adapters:
            shard.data.copy_(_read(shard, read))
    if not adapters:
        for name, layer, shards in quantized_parts(model):
            layer.hold_weight(_read_whole(shards, read), name.rpartition(".")[2])


def _read_whole(shards: Sequence[ShardedTensor], read: Read) -> Tensor:
    """This rank's part of a weight out of its pieces."""
    pieces = [_read(shard, read) for shard in shards]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _read(shard: ShardedTensor, read: Read) -> Tensor:
    stacked = shard.prepend_axis_num
    place, first = shard.global_offset[:stacked], shard.global_offset[stacked:]
    return read(shard.key, place, first, tuple(shard.data.shape))
