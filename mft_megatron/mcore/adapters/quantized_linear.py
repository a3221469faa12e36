"""Megatron-Core's linear layers with a frozen weight in 4 bits (:mod:`.nf4`), for adapters beside it.

::

    forward   codes ─► W in the model's dtype ─► Megatron-Core's product ─► W is freed
    backward  codes ─► W again ─► gradient of the input

What is quantised is each matrix of Hugging Face's as a whole: blocks are within rows, and the magnitudes of all blocks,
1/64 of the weights, are gathered over tensor-parallel ranks before their second level. So a model's numbers are the
same on every layout, and those of transformers with ``load_in_4bit`` and double quantisation.

A weight has no content until :meth:`hold_weight`, and no place in a checkpoint.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn import Parameter

from mft_megatron.mcore.parallel.sharded_weights import shards_in
from mft_megatron.mcore.platform import devices

from .fused_rows import source_of_rows
from .nf4 import BLOCK, GROUP, compress, expand, kernels


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """This rank's part [out, in] of a weight.

    ``codes``: uint8 [out · in / 2], two elements each. ``magnitudes``: uint8 [out, in / 64], codes of the blocks'.
    ``first_R``: int32 [out], the number of each row's first block; 256 numbers are a group. ``largest_G``,
    ``offset_G``: fp32 [groups], of all groups of the whole matrix.
    """

    codes: Tensor
    magnitudes: Tensor
    first_R: Tensor
    largest_G: Tensor
    offset_G: Tensor

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in dataclasses.fields(self))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The part's content."""
        rows, blocks = self.magnitudes.shape
        number = self.first_R[:, None] + torch.arange(blocks, dtype=torch.int32, device=self.codes.device)
        group = (number // GROUP).view(-1)
        largest, offset = (of.index_select(0, group).view(rows, blocks) for of in (self.largest_G, self.offset_G))
        magnitudes = expand(self.magnitudes, largest, offset)
        return kernels().dequantize(self.codes, magnitudes.view(-1), (rows, blocks * BLOCK), dtype)


def quantize(weight: Tensor, source_R: Tensor, split_axis: int, group: dist.ProcessGroup) -> QuantizedWeight:
    """Quantise this rank's part of a matrix; a collective of ``group``.

    Args:
        weight: [out, in] of this rank, on its device; fp32, bf16 or fp16. 64 divides ``in``.
        source_R: int64 [out], which matrix of Hugging Face's each row is of, on the same device.
        split_axis: that is split over ranks.
        group: its ranks.
    """
    rows, blocks = weight.shape[0], weight.shape[1] // BLOCK
    codes, magnitudes = kernels().quantize(weight)
    parts = _gathered(magnitudes.view(rows, blocks), group)
    here, size = dist.get_rank(group), len(parts)
    kept = torch.empty(rows, blocks, dtype=torch.uint8, device=weight.device)
    first_R = torch.empty(rows, dtype=torch.int32, device=weight.device)
    largest, offset = [], []
    for source in source_R.unique().tolist():
        mine = source_R == source
        whole = torch.cat([part[mine] for part in parts], split_axis)
        found, (height, width) = compress(whole.view(-1)), whole.shape
        row, column = ((here * height // size, 0), (0, here * width // size))[split_axis]
        kept[mine] = found.codes.view(height, width)[row:, column:][: int(mine.sum()), :blocks]
        number = torch.arange(row, row + int(mine.sum()), dtype=torch.int32, device=weight.device) * width + column
        # groups of the sources follow one another; each source begins a new one
        first_R[mine] = number + GROUP * sum(map(len, largest))
        largest.append(found.largest)
        offset.append(found.offset.expand_as(found.largest))
    return QuantizedWeight(codes, kept, first_R, torch.cat(largest), torch.cat(offset))


def _gathered(part: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if dist.get_world_size(group) == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts


class QuantizedLinear:
    """What both kinds of linear layer have. ``weight``, without content, has shape and dtype of this rank's part."""

    split_axis: int
    quantized: QuantizedWeight | None = None

    def __init__(self, *args, **named):
        """
        Raises:
            ValueError: 64 does not divide a row of this rank's part.
        """
        super().__init__(*args, **named)
        allocated = self._parameters.pop("weight")
        if allocated.shape[1] % BLOCK:
            raise ValueError(f"rows of {allocated.shape[1]} elements on a rank are no whole blocks of {BLOCK}")
        self.weight = torch.empty_like(allocated, device="meta", requires_grad=False)

    def hold_weight(self, content: Tensor, module: str) -> None:
        """Quantise this rank's part of the weight and keep that; all tensor-parallel ranks call it together.

        Args:
            content: [out, in] of this rank, of a floating-point dtype, anywhere.
            module: the layer's name, e.g. ``linear_qkv``.
        """
        source_R = source_of_rows(module, self.config, content.shape[0]).to(devices.device())
        self.quantized = quantize(content.to(devices.device()), source_R, self.split_axis, self.tp_group)

    def _forward_impl(self, input, weight, *args, **named):
        """Megatron-Core's product; ``weight`` has no content, and what has some is not kept for the backward pass."""
        if self.quantized is None:
            raise RuntimeError("a quantised weight has no content yet")
        return _product(super()._forward_impl, self.quantized, weight.dtype, input, *args, **named)


def _product(product, quantized: QuantizedWeight, dtype: torch.dtype, input: Tensor, *args, **named) -> Tensor:
    weight = quantized.dequantize(dtype)
    address = weight.data_ptr()

    def pack(saved: Tensor) -> Tensor | QuantizedWeight:
        return quantized if saved.data_ptr() == address else saved

    def unpack(kept: Tensor | QuantizedWeight) -> Tensor:
        return kept.dequantize(dtype) if isinstance(kept, QuantizedWeight) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return product(input, weight, *args, **named)


class QuantizedColumnParallelLinear(QuantizedLinear, ColumnParallelLinear):
    """Rows are split."""

    split_axis = 0


class QuantizedRowParallelLinear(QuantizedLinear, RowParallelLinear):
    """Columns are split."""

    split_axis = 1


def quantize_layer(layer: ModuleSpec) -> None:
    """Have the linear layers of a transformer layer's specification quantised, in place; those of experts stay.

    Raises:
        InputError: nothing can compute that here.
    """
    kernels()
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
    attention.linear_qkv, attention.linear_proj = QuantizedColumnParallelLinear, QuantizedRowParallelLinear
    if hasattr(mlp, "linear_fc1"):
        mlp.linear_fc1, mlp.linear_fc2 = QuantizedColumnParallelLinear, QuantizedRowParallelLinear


def quantized_layers(model: torch.nn.Module) -> dict[str, QuantizedLinear]:
    """Of a model of Megatron-Core's, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def quantized_parts(model: GPTModel) -> Iterator[tuple[str, QuantizedLinear, list[ShardedTensor]]]:
    """Quantised layers by name, and where in a checkpoint the pieces of this rank's part of each weight lie, from its
    first row to its last; they have no content."""
    layers = quantized_layers(model)
    for layer in layers.values():
        layer._parameters["weight"] = Parameter(layer.weight, requires_grad=False)
    try:
        state = model.sharded_state_dict()
    finally:
        for layer in layers.values():
            del layer._parameters["weight"]
    return ((name, layer, list(shards_in([state[f"{name}.weight"]]))) for name, layer in layers.items())
