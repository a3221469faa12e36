"""Load this rank's weights from any source, such as a Hugging Face folder, without a checkpoint.

The sharded state dict knows which slice of each weight belongs to this rank; only that slice is read. Weights that are
kept in 4 bits are in memory one at a time.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from collections.abc import Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from mft_megatron.errors import InputError
from mft_megatron.lora import is_adapter
from mft_megatron.mcore.adapters.quantized_linear import quantized_shards
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.parallel.sharded_weights import shards_of
from mft_megatron.mcore.trainer import Trainer

from .weight_source import WeightSlice, WeightSource


def fill_weights(trainer: Trainer, source: WeightSource, adapters: bool = False) -> None:
    """Fill the weights of the trainer's model as :func:`fill_model` does, and the optimizer's copies of them.

    A collective of all ranks, which all raise what one of them cannot read.
    """
    tried = _Tried(source)
    for chunk in trainer.chunks:
        fill_model(chunk.module, tried, adapters)
    process_groups.raise_on_all_ranks(tried.refusal)
    trainer.optimizer.reload_model_params()


@torch.no_grad()
def fill_model(model: GPTModel, source: WeightSource, adapters: bool = False) -> None:
    """Fill the weights of a model, in place.

    Args:
        model: this rank's model, or a stage of it.
        source: where weights are read from; converted to the dtype and device of the parameters.
        adapters: fill the weights of adapters alone; otherwise all others.

    Raises:
        InputError: the source lacks a weight, or is damaged.
    """
    for shard in shards_of(model):
        if is_adapter(shard.key) == adapters:
            shard.data.copy_(source.read(slice_of(shard)))
    if not adapters:
        for name, layer, shards in quantized_shards(model):
            layer.hold_weight(_read_shards(shards, source), name.rpartition(".")[2])


class _Tried:
    """A source that gives zeros from its first refusal on, because other ranks wait for this one.

    Attributes:
        refusal: the message of the refusal; ``None`` without one.
    """

    def __init__(self, source: WeightSource):
        self._source = source
        self.refusal: str | None = None

    def read(self, wanted: WeightSlice) -> Tensor:
        """Read one slice."""
        if self.refusal is None:
            try:
                return self._source.read(wanted)
            except InputError as error:
                self.refusal = str(error)
        return torch.zeros(wanted.shape)


def slice_of(shard: ShardedTensor) -> WeightSlice:
    """The slice of a checkpoint's weight that a shard stands for."""
    stacked = shard.prepend_axis_num
    index, start = shard.global_offset[:stacked], shard.global_offset[stacked:]
    return WeightSlice(shard.key, index, start, tuple(shard.data.shape))


def _read_shards(shards: Sequence[ShardedTensor], source: WeightSource) -> Tensor:
    """This rank's part of a weight [rows, columns] whose shards are stored separately, such as gate and up."""
    contents = [source.read(slice_of(shard)) for shard in shards]
    return contents[0] if len(contents) == 1 else torch.cat(contents)
