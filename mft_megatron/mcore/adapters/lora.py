"""Low-rank adapters on Megatron-Core's split linear layers; everything else of the model is frozen.

::

    column-parallel   W [out/TP, in], A [n·r, in]     on every rank, B [out/TP, r]
    row-parallel      W [out, in/TP], A [n·r, in/TP], B [out, r]     on every rank

Ranks exchange only A x, n·r values per token; the base layer's communication is unchanged. Gradients of the matrix that
every rank has are complete on each rank. With sequence parallelism they are sums over the rank's tokens, and Megatron
reduces them because of the mark ``sequence_parallel``, as it does for norms.

The adapters are parameters of the linear layers: the layers keep their names in a checkpoint, and Megatron's hooks on
the parameters of a module include them.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import contextlib
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP, apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Parameter

from mft_megatron.lora import Lora, Target
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.platform.megatron_fixes import become

from .fused_rows import source_of_rows
from .quantized_linear import QuantizedColumnParallelLinear, QuantizedRowParallelLinear


def add_adapters(model: GPTModel, lora: Lora) -> None:
    """Freeze a ``GPTModel``, or one stage of it, and put adapters on its linear layers.

    The matrices are left uninitialised: :func:`.model.initialize.initialize_adapters` or a checkpoint fills them.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in model.decoder.layers:
        parents = {"linear_qkv": layer.self_attention, "linear_proj": layer.self_attention}
        if isinstance(layer.mlp, MLP):
            parents |= {"linear_fc1": layer.mlp, "linear_fc2": layer.mlp}
        for target in lora.targets:
            linear = getattr(parents[target.module], target.module)
            become(linear, ADAPTED[type(linear)])
            linear.add_adapter(lora, target)


class _Adapted(torch.nn.Module):
    """The common part of both kinds of linear layer: ``y = W x + scale · B (A x)``.

    There are n matrices A: one for all sources of W, or one for each (:class:`mft_megatron.lora.Target`). Row o of B is
    multiplied with the r outputs of the A that serves the source of row o of W; without such an A it is 0 and has no
    gradient.

    Attributes:
        lora_a: [n·r, in of this rank], the dtype of the model.
        lora_b: [out of this rank, r], the dtype of the model.
        lora_mask: bool [out of this rank, n], whether each A serves each row; ``None`` where one A serves all.
        split_axes: axis along which each parameter is split over tensor-parallel ranks.
        splits_input: whether ranks have different columns of the input, and so sample dropout independently.
    """

    split_axes: ClassVar[dict[str, int]]
    splits_input: ClassVar[bool]
    lora_mask: Tensor | None
    # attributes of Megatron-Core's layer
    config: TransformerConfig
    input_size: int
    output_size: int
    input_size_per_partition: int
    output_size_per_partition: int
    sequence_parallel: bool
    tp_group: dist.ProcessGroup

    def add_adapter(self, lora: Lora, target: Target) -> None:
        """Allocate the matrices, uninitialised."""
        self.lora_scale, self.lora_dropout = lora.scale, lora.dropout
        self.lora_gated = target.module == "linear_fc1" and target.sources > 1
        columns, rows = self.input_size, self.output_size
        if isinstance(self, ColumnParallelLinear):
            rows = self.output_size_per_partition
        else:
            columns = self.input_size_per_partition
        dtype, device = self.config.params_dtype, devices.device()
        self.lora_a = Parameter(torch.empty(len(target.parts) * lora.rank, columns, dtype=dtype, device=device))
        self.lora_b = Parameter(torch.empty(rows, lora.rank, dtype=dtype, device=device))
        for name, parameter in (("lora_a", self.lora_a), ("lora_b", self.lora_b)):
            if name in self.split_axes:
                set_tensor_model_parallel_attributes(parameter, True, self.split_axes[name], 1)
            else:
                # Megatron-Core reads this attribute of a parameter
                parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        self.register_buffer("lora_mask", _mask(target, self.config, rows), persistent=False)

    def add_product(self, output: Tensor, low: Tensor) -> Tensor:
        """Add scale · B times ``low``.

        Args:
            output: [s, b, out of this rank], the base layer's.
            low: [s, b, n·r], A times the input.

        Returns:
            [s, b, out of this rank], a new tensor.
        """
        b: Tensor = self.lora_b
        if self.lora_mask is not None:
            b = (b[:, None] * self.lora_mask[:, :, None]).flatten(1)
        return torch.addmm(output.flatten(0, 1), low.flatten(0, 1), b.t(), alpha=self.lora_scale).view_as(output)

    def dropped(self, hidden: Tensor) -> Tensor:
        """Apply the adapter's dropout to the input of A, [s, b, in of this rank]; only while training."""
        if not self.training or not self.lora_dropout:
            return hidden
        # under sequence parallelism Megatron-Core has forked the random state for the whole block already
        forks = self.splits_input and not self.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if forks else contextlib.nullcontext():
            return F.dropout(hidden, self.lora_dropout)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Give the base layer's sharded state, with A and B."""
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self.split_axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.lora_gated:
            # each rank has its shard of the gate above its shard of the up projection; Megatron handles W and its bias
            key = f"{prefix}lora_b"
            state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets)
        return state


class AdaptedColumnParallelLinear(_Adapted, ColumnParallelLinear):
    """Column-parallel linear layer with an adapter: rows of W and B are split over ranks."""

    split_axes: ClassVar = {"weight": 0, "bias": 0, "lora_b": 0}
    splits_input = False

    def forward(self, input_: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        """Compute [s, b, in] -> [s, b, out / TP] and the bias that is still to be added, as the base layer does."""
        output, bias = super().forward(input_, *others, **named)
        low = F.linear(self.dropped(input_), self.lora_a)
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        return self.add_product(output, low), bias


class AdaptedRowParallelLinear(_Adapted, RowParallelLinear):
    """Row-parallel linear layer with an adapter: columns of W and A are split over ranks."""

    split_axes: ClassVar = {"weight": 1, "lora_a": 1}
    splits_input = True

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute [s, b, in / TP] -> [s, b, out] and the bias that is still to be added, as the base layer does."""
        output, bias = super().forward(input_)
        low = F.linear(self.dropped(input_), self.lora_a)
        if self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        return self.add_product(output, low), bias


class AdaptedQuantizedColumnParallelLinear(AdaptedColumnParallelLinear, QuantizedColumnParallelLinear):
    """Column-parallel linear layer with an adapter beside a weight in 4 bits."""


class AdaptedQuantizedRowParallelLinear(AdaptedRowParallelLinear, QuantizedRowParallelLinear):
    """Row-parallel linear layer with an adapter beside a weight in 4 bits."""


ADAPTED = {
    ColumnParallelLinear: AdaptedColumnParallelLinear,
    RowParallelLinear: AdaptedRowParallelLinear,
    QuantizedColumnParallelLinear: AdaptedQuantizedColumnParallelLinear,
    QuantizedRowParallelLinear: AdaptedQuantizedRowParallelLinear,
}


def _mask(target: Target, config: TransformerConfig, rows: int) -> Tensor | None:
    """Whether each A serves each row of B: bool [rows, n]; ``None`` where one A serves all."""
    if target.parts == (tuple(range(target.sources)),):
        return None
    source = source_of_rows(target.module, config, rows)
    served = [torch.isin(source, torch.tensor(part)) for part in target.parts]
    return torch.stack(served, 1).to(devices.device())
