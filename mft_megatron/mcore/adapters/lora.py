"""Low-rank adapters on Megatron-Core's split linear layers; everything else of the model is frozen.

::

    column-parallel   W [out/TP, in], A [n·r, in]     on every rank, B [out/TP, r]
    row-parallel      W [out, in/TP], A [n·r, in/TP], B [out, r]     on every rank

Ranks exchange A x alone, n·r numbers a token: what the base layer sends is not touched. Gradients of the matrix that
every rank has are whole on each of them, or with sequence parallelism sums over the rank's own tokens, which Megatron
adds up because of the mark ``sequence_parallel``, as it does for norms.

The adapters are parameters of the linear layers, so that these keep their names in a checkpoint, and Megatron's hooks,
that wait for parameters of a module, know them.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import contextlib
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
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


def add_adapters(model: torch.nn.Module, lora: Lora) -> None:
    """Freeze a ``GPTModel``, of which this may be one stage, and put adapters on its linear layers.

    What they hold, :func:`.model.initialize.initialize_adapters` or a checkpoint says.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in model.decoder.layers:
        places = {"linear_qkv": layer.self_attention, "linear_proj": layer.self_attention}
        if isinstance(layer.mlp, MLP):
            places |= {"linear_fc1": layer.mlp, "linear_fc2": layer.mlp}
        for target in lora.targets:
            linear = getattr(places[target.module], target.module)
            become(linear, ADAPTED[type(linear)])
            linear.add_adapter(lora, target)


class _Adapted:
    """What both kinds of linear layer have: ``y = W x + scale · B (A x)``.

    ``lora_a`` [n·r, in of this rank] and ``lora_b`` [out of this rank, r], where n is the number of A's: one for all
    sources of W, or one for each (:class:`mft_megatron.lora.Target`). Row o of B meets the r numbers of that A which
    serves the source of row o of W; where none does, it is 0 and has no gradient.
    """

    split_axes: ClassVar[dict[str, int]]
    # whether ranks have other columns of the input, and so draw numbers of their own for its dropout
    splits_input: ClassVar[bool]

    def add_adapter(self, lora: Lora, target: Target) -> None:
        """Make the matrices, without content."""
        self.lora_scale, self.lora_dropout = lora.scale, lora.dropout
        self.lora_gated = target.module == "linear_fc1" and target.sources > 1
        columns, rows = self.input_size, self.output_size
        if isinstance(self, ColumnParallelLinear):
            rows = self.output_size_per_partition
        else:
            columns = self.input_size_per_partition
        where = {"dtype": self.config.params_dtype, "device": devices.device()}
        self.lora_a = Parameter(torch.empty(len(target.parts) * lora.rank, columns, **where))
        self.lora_b = Parameter(torch.empty(rows, lora.rank, **where))
        for name, parameter in (("lora_a", self.lora_a), ("lora_b", self.lora_b)):
            if name in self.split_axes:
                set_tensor_model_parallel_attributes(parameter, True, self.split_axes[name], 1)
            else:
                parameter.sequence_parallel = self.config.sequence_parallel
        self.register_buffer("lora_meets", _meets(target, self.config, rows), persistent=False)

    def add_product(self, output: Tensor, low: Tensor) -> Tensor:
        """``output`` [s, b, out of this rank] plus scale · B times ``low`` [s, b, n·r]."""
        b = self.lora_b
        if self.lora_meets is not None:
            b = (b[:, None] * self.lora_meets[:, :, None]).flatten(1)
        return torch.addmm(output.flatten(0, 1), low.flatten(0, 1), b.t(), alpha=self.lora_scale).view_as(output)

    def dropped(self, hidden: Tensor) -> Tensor:
        """What A is given."""
        if not self.training or not self.lora_dropout:
            return hidden
        # under sequence parallelism the whole block is in a fork of the random state already
        forks = self.splits_input and not self.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if forks else contextlib.nullcontext():
            return F.dropout(hidden, self.lora_dropout)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """As the base layer's, with A and B."""
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self.split_axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.lora_gated:
            # each rank has its part of the gate above its part of the up projection; Megatron sees to W and its bias
            key = f"{prefix}lora_b"
            state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets)
        return state


class AdaptedColumnParallelLinear(_Adapted, ColumnParallelLinear):
    """Rows of W and B are split."""

    split_axes: ClassVar = {"weight": 0, "bias": 0, "lora_b": 0}
    splits_input = False

    def forward(self, input_: Tensor, *others, **named) -> tuple[Tensor, Tensor | None]:
        """[s, b, in] -> [s, b, out / TP], as the base layer."""
        output, bias = super().forward(input_, *others, **named)
        low = F.linear(self.dropped(input_), self.lora_a)
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        return self.add_product(output, low), bias


class AdaptedRowParallelLinear(_Adapted, RowParallelLinear):
    """Columns of W and A are split."""

    split_axes: ClassVar = {"weight": 1, "lora_a": 1}
    splits_input = True

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, in / TP] -> [s, b, out], as the base layer."""
        output, bias = super().forward(input_)
        low = F.linear(self.dropped(input_), self.lora_a)
        if self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        return self.add_product(output, low), bias


class AdaptedQuantizedColumnParallelLinear(AdaptedColumnParallelLinear, QuantizedColumnParallelLinear):
    """W is kept in 4 bits."""


class AdaptedQuantizedRowParallelLinear(AdaptedRowParallelLinear, QuantizedRowParallelLinear):
    """W is kept in 4 bits."""


ADAPTED = {
    ColumnParallelLinear: AdaptedColumnParallelLinear,
    RowParallelLinear: AdaptedRowParallelLinear,
    QuantizedColumnParallelLinear: AdaptedQuantizedColumnParallelLinear,
    QuantizedRowParallelLinear: AdaptedQuantizedRowParallelLinear,
}


def _meets(target: Target, config: TransformerConfig, rows: int) -> Tensor | None:
    """Whether a row of B meets the numbers of an A: bool [rows, n]; ``None`` where all meet the only one."""
    if target.parts == (tuple(range(target.sources)),):
        return None
    source = source_of_rows(target.module, config, rows)
    meets = torch.zeros(rows, len(target.parts), dtype=torch.bool)
    for number, part in enumerate(target.parts):
        meets[:, number] = torch.isin(source, torch.tensor(part))
    return meets.to(devices.device())


def bound_of_a(columns: int) -> float:
    """Elements of A are drawn uniformly between this and its negative: Kaiming's bound as PEFT takes it."""
    return 1 / math.sqrt(columns)
