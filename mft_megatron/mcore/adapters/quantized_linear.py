"""Megatron-Core's linear layers with a frozen weight in 4 bits (:mod:`.nf4`), for adapters beside it.

::

    forward   codes ─► W in the model's dtype ─► Megatron-Core's product ─► W is freed
    backward  codes ─► W computed again ─► gradient of the input

Each Hugging Face matrix is quantised as a whole: blocks are within rows, and the magnitudes of all blocks, 1/64 of the
weights, are gathered over tensor-parallel ranks before their second level. So the values are the same on every parallel
layout, and equal those of transformers with ``load_in_4bit`` and double quantisation.

A weight has no content until :meth:`QuantizedLinear.hold_weight`, and is not stored in checkpoints.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter

from mft_megatron.mcore.parallel.sharded_weights import shards_in
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.platform.releases import submodules_of

from .fused_rows import source_of_rows
from .nf4 import BLOCK, GROUP, compress, expand, kernels


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """This rank's shard [out, in] of a weight in 4 bits. R: rows of the shard, G: groups of the whole weight.

    Attributes:
        codes: uint8 [out · in / 2], two elements each.
        magnitudes: uint8 [out, in / 64], codes of the blocks' magnitudes.
        first_R: int32 [out], index of each row's first block; 256 consecutive indices are a group.
        largest_G: fp32 [groups], see :class:`.nf4.Magnitudes`.
        offset_G: fp32 [groups], the offset of each group's matrix.
    """

    codes: Tensor
    magnitudes: Tensor
    first_R: Tensor
    largest_G: Tensor
    offset_G: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(getattr(self, field.name).nbytes for field in dataclasses.fields(self))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Compute the shard's content, [out, in] of ``dtype``."""
        rows, blocks = self.magnitudes.shape
        index = self.first_R[:, None] + torch.arange(blocks, dtype=torch.int32, device=self.codes.device)
        group = (index // GROUP).view(-1)
        largest, offset = (
            value_G.index_select(0, group).view(rows, blocks) for value_G in (self.largest_G, self.offset_G)
        )
        magnitudes = expand(self.magnitudes, largest, offset)
        return kernels().dequantize(self.codes, magnitudes.view(-1), (rows, blocks * BLOCK), dtype)


def quantize(weight: Tensor, source_R: Tensor, split_axis: int, group: dist.ProcessGroup) -> QuantizedWeight:
    """Quantise this rank's shard of a weight; a collective of ``group``.

    Args:
        weight: [out, in] of this rank, on its device; fp32, bf16 or fp16. 64 divides ``in``.
        source_R: int64 [out], the Hugging Face matrix of each row (:func:`.source_of_rows`), on the same device.
        split_axis: axis of the weight that is split over ranks.
        group: the tensor-parallel ranks.
    """
    rows, blocks = weight.shape[0], weight.shape[1] // BLOCK
    codes, magnitudes = kernels().quantize(weight)
    shards = _all_gather(magnitudes.view(rows, blocks), group)
    rank, size = dist.get_rank(group), len(shards)
    magnitude_codes = torch.empty(rows, blocks, dtype=torch.uint8, device=weight.device)
    first_R = torch.empty(rows, dtype=torch.int32, device=weight.device)
    largest: list[Tensor] = []
    offset: list[Tensor] = []
    groups = 0
    for source in source_R.unique().tolist():
        of_source = source_R == source
        whole = torch.cat([shard[of_source] for shard in shards], split_axis)
        compressed, (height, width) = compress(whole.view(-1)), whole.shape
        row, column = ((rank * height // size, 0), (0, rank * width // size))[split_axis]
        count = int(of_source.sum())
        magnitude_codes[of_source] = compressed.codes.view(height, width)[row:, column:][:count, :blocks]
        index = torch.arange(row, row + count, dtype=torch.int32, device=weight.device) * width + column
        # groups of consecutive sources are concatenated; each source begins a new group
        first_R[of_source] = index + GROUP * groups
        groups += len(compressed.largest)
        largest.append(compressed.largest)
        offset.append(compressed.offset.expand_as(compressed.largest))
    return QuantizedWeight(codes, magnitude_codes, first_R, torch.cat(largest), torch.cat(offset))


def _all_gather(shard: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if dist.get_world_size(group) == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards


class QuantizedLinear(torch.nn.Module):
    """The common part of both kinds of linear layer.

    Attributes:
        weight: a meta tensor with shape [out, in] and dtype of this rank's shard.
        quantized: the shard's content; ``None`` until :meth:`hold_weight`.
        split_axis: axis of the weight that is split over tensor-parallel ranks.
    """

    split_axis: int
    weight: Tensor
    quantized: QuantizedWeight | None = None
    # attributes of Megatron-Core's layer
    config: TransformerConfig
    tp_group: dist.ProcessGroup

    def __init__(self, *args: Any, **named: Any):
        """Build Megatron-Core's layer and drop its weight.

        Raises:
            ValueError: 64 does not divide a row of this rank's shard.
        """
        super().__init__(*args, **named)
        allocated = self.weight
        del self.weight
        if allocated.shape[1] % BLOCK:
            raise ValueError(
                f"rows of {allocated.shape[1]} elements on a rank are no multiple of the block size {BLOCK}"
            )
        # a single element: the meta device is that of a simulated GPU, whose memory is counted
        self.weight = torch.empty((), dtype=allocated.dtype, device="meta").expand(allocated.shape)

    def hold_weight(self, content: Tensor, module: str) -> None:
        """Quantise this rank's shard of the weight and keep the result; a collective of the tensor-parallel ranks.

        Args:
            content: [out, in] of this rank, of a floating-point dtype, on any device.
            module: the layer's name, e.g. ``linear_qkv``.
        """
        source_R = source_of_rows(module, self.config, content.shape[0]).to(devices.device())
        self.quantized = quantize(content.to(devices.device()), source_R, self.split_axis, self.tp_group)

    def hold_shapes(self, module: str) -> None:
        """Keep what :meth:`hold_weight` keeps, without content, on a simulated GPU.

        Args:
            module: as there.
        """
        rows, blocks = self.weight.shape[0], self.weight.shape[1] // BLOCK
        of_source = source_of_rows(module, self.config, rows).bincount() * blocks * dist.get_world_size(self.tp_group)
        groups = int((-(-of_source // GROUP)).sum())
        codes, _ = kernels().quantize(self.weight)
        self.quantized = QuantizedWeight(
            codes,
            codes.new_empty(rows, blocks),
            codes.new_empty(rows, dtype=torch.int32),
            codes.new_empty(groups, dtype=torch.float32),
            codes.new_empty(groups, dtype=torch.float32),
        )

    def weight_or_raise(self) -> QuantizedWeight:
        """Give the content.

        Raises:
            RuntimeError: there is none yet.
        """
        if self.quantized is None:
            raise RuntimeError("a quantised weight has no content yet")
        return self.quantized

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **named: Any) -> Tensor:
        """Compute Megatron-Core's product with the content instead of ``weight``, which has none.

        The dequantised weight is not kept for the backward pass.
        """
        product = super()._forward_impl  # type: ignore[misc]  # of the next base class, Megatron-Core's layer
        return _product(product, self.weight_or_raise(), weight.dtype, input, *args, **named)


def _product(
    product: Callable[..., Tensor],
    quantized: QuantizedWeight,
    dtype: torch.dtype,
    input: Tensor,
    *args: Any,
    **named: Any,
) -> Tensor:
    weight = quantized.dequantize(dtype)
    # not by its address: tensors of a dry run have none
    storage = weight.untyped_storage()._cdata

    def pack(saved: Tensor) -> Tensor | QuantizedWeight:
        return quantized if saved.untyped_storage()._cdata == storage else saved

    def unpack(kept: Tensor | QuantizedWeight) -> Tensor:
        return kept.dequantize(dtype) if isinstance(kept, QuantizedWeight) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return product(input, weight, *args, **named)


class QuantizedColumnParallelLinear(QuantizedLinear, ColumnParallelLinear):
    """Column-parallel linear layer with a weight in 4 bits; rows are split over ranks."""

    split_axis = 0


class QuantizedRowParallelLinear(QuantizedLinear, RowParallelLinear):
    """Row-parallel linear layer with a weight in 4 bits; columns are split over ranks."""

    split_axis = 1


def quantize_layer(layer: ModuleSpec) -> None:
    """Make the linear layers in a transformer layer's specification quantised ones, in place, except experts'.

    Raises:
        InputError: there is a CUDA device, and the library of its kernels is not installed.
    """
    kernels()
    attention, mlp = submodules_of(layer.submodules.self_attention), submodules_of(layer.submodules.mlp)
    attention.linear_qkv, attention.linear_proj = QuantizedColumnParallelLinear, QuantizedRowParallelLinear
    if hasattr(mlp, "linear_fc1"):
        mlp.linear_fc1, mlp.linear_fc2 = QuantizedColumnParallelLinear, QuantizedRowParallelLinear


def quantized_layers(model: torch.nn.Module) -> dict[str, QuantizedLinear]:
    """Quantised linear layers of a model, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def hold_shapes(model: torch.nn.Module) -> list[QuantizedLinear]:
    """Let the quantised layers of a model keep shapes without content; returns the layers."""
    layers = quantized_layers(model)
    for name, layer in layers.items():
        layer.hold_shapes(name.rpartition(".")[2])
    return list(layers.values())


def quantized_shards(model: GPTModel) -> Iterator[tuple[str, QuantizedLinear, list[ShardedTensor]]]:
    """Yield the name of each quantised layer, the layer, and the shards that its weight would have in a checkpoint.

    The shards of a weight, such as gate and up projection, are in the order of its rows. They have no content.
    """
    layers = quantized_layers(model)
    for layer in layers.values():
        layer._parameters["weight"] = Parameter(layer.weight, requires_grad=False)
    try:
        state = model.sharded_state_dict()
    finally:
        for layer in layers.values():
            del layer._parameters["weight"]
    return ((name, layer, list(shards_in([state[f"{name}.weight"]]))) for name, layer in layers.items())
