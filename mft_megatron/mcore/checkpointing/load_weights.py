"""Load this rank's weights from any source, such as a Hugging Face folder, without a checkpoint.

The sharded state dict knows which slice of each weight belongs to this rank. Ranks that hold the same slices share the
reading (:mod:`.shared_reading`). Weights that are kept in 4 bits are on the device one at a time.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from mft_megatron.lora import is_adapter
from mft_megatron.mcore.adapters.quantized_linear import QuantizedLinear, quantized_shards
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.parallel.sharded_weights import shards_of
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.trainer import Trainer

from .shared_reading import Piece, SharedReader
from .weight_source import WeightSlice, WeightSource


def fill_weights(trainer: Trainer, source: WeightSource, adapters: bool = False) -> None:
    """Fill the weights of the trainer's model as :func:`fill_models` does, and the optimizer's copies of them."""
    fill_models([chunk.module for chunk in trainer.chunks], source, adapters)
    trainer.optimizer.reload_model_params()


@torch.no_grad()
def fill_models(models: Sequence[GPTModel], source: WeightSource, adapters: bool = False) -> None:
    """Fill the weights of this rank's models, in place; a collective of all ranks.

    Args:
        models: stages of the model, or the whole one.
        source: where weights are read from; converted to the dtype and device of the parameters.
        adapters: fill the weights of adapters alone; otherwise all others.

    Raises:
        InputError: the source lacks a weight, or is damaged, on any rank; the same on all ranks.
    """
    dense: list[_Weight | _QuantizedWeight] = []
    of_experts: list[_Weight | _QuantizedWeight] = []
    for model in models:
        for weight in _weights(shard for shard in shards_of(model) if is_adapter(shard.key) == adapters):
            (of_experts if ".experts." in weight.slices[0].name else dense).append(weight)
        if not adapters:
            dense += [_QuantizedWeight(name, layer, shards) for name, layer, shards in quantized_shards(model)]
    refusals = (
        _fill(dense, source, parallel_state.get_data_parallel_group(with_context_parallel=True)),
        _fill(of_experts, source, parallel_state.get_expert_data_parallel_group()),
    )
    process_groups.raise_on_all_ranks(refusals[0] or refusals[1])


def _fill(
    weights: "Sequence[_Weight | _QuantizedWeight]", source: WeightSource, group: dist.ProcessGroup
) -> str | None:
    """Fill weights that all ranks of a group have; returns why this rank could not read one, or ``None``."""
    reader = SharedReader(source, group)
    reader.read([weight.slices for weight in weights], lambda piece: weights[piece.weight].take(piece))
    return reader.refusal


def slice_of(shard: ShardedTensor) -> WeightSlice:
    """The slice of a checkpoint's weight that a shard stands for."""
    stacked = shard.prepend_axis_num
    index, start = shard.global_offset[:stacked], shard.global_offset[stacked:]
    return WeightSlice(shard.key, index, start, tuple(shard.data.shape))


class _Weight:
    """A weight of this rank whose slices are views of parameters.

    Attributes:
        slices: of the checkpoint's weight.
    """

    def __init__(self, first: ShardedTensor):
        self.slices = [slice_of(first)]
        self._views = [first.data]

    def add(self, shard: ShardedTensor) -> bool:
        """Add the next slice, if it is one of the same weight."""
        wanted = slice_of(shard)
        same = (wanted.name, wanted.index) == (self.slices[0].name, self.slices[0].index)
        if same:
            self.slices.append(wanted)
            self._views.append(shard.data)
        return same

    def take(self, piece: Piece) -> None:
        """Keep some rows."""
        self._views[piece.part][piece.first : piece.first + len(piece.content)].copy_(piece.content)


def _weights(shards: Iterable[ShardedTensor]) -> list[_Weight]:
    """The weights of consecutive shards."""
    weights: list[_Weight] = []
    for shard in shards:
        if not weights or not weights[-1].add(shard):
            weights.append(_Weight(shard))
    return weights


class _QuantizedWeight:
    """A weight of this rank that its layer keeps in 4 bits, as soon as all of its rows are there.

    Attributes:
        slices: of the checkpoint's weight, in the order of the rows.
    """

    def __init__(self, name: str, layer: QuantizedLinear, shards: Sequence[ShardedTensor]):
        self.slices = [slice_of(shard) for shard in shards]
        self._module, self._layer = name.rpartition(".")[2], layer
        self._content: Tensor | None = None
        self._filled = 0

    def take(self, piece: Piece) -> None:
        """Collect some rows, which come in order; with the last ones a collective of the tensor-parallel ranks."""
        if self._content is None:
            rows = sum(part.shape[0] for part in self.slices)
            self._content = piece.content.new_empty(rows, *self.slices[0].shape[1:], device=devices.device())
        self._content[self._filled : self._filled + len(piece.content)] = piece.content
        self._filled += len(piece.content)
        if self._filled == len(self._content):
            self._layer.hold_weight(self._content, self._module)
            self._content = None
