"""Initial weights that depend on the seed alone, not on the layout.

Megatron draws weights rank by rank, so that another layout is another model (and with gated units even its
CPU initialisation differs between tensor-parallel sizes). Here each parameter has a random stream of its own, named by
the seed and the parameter's place in the checkpoint; a rank draws the whole parameter and keeps its part. What "its
part" is, the sharded state dict knows already.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import hashlib
import math
from collections.abc import Callable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor

from mft_megatron.lora import LORA_B, is_adapter
from mft_megatron.mcore.adapters.lora import bound_of_a
from mft_megatron.mcore.parallel.sharded_weights import shards_of

SPLIT_AXIS = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}


@torch.no_grad()
def initialize_weights(
    model: torch.nn.Module, seed: int, std: float, embedding_std: float | None = None, xavier: bool = False
) -> None:
    """Draw all weights of this rank's part of the model, in place.

    Matrices are normal with standard deviation ``std``; those that write into the residual stream
    (``linear_proj``, ``linear_fc2``) are scaled by ``1 / sqrt(2 · layers)``; biases are 0 and norm weights 1
    (0 where they are stored less 1): Megatron's defaults.

    Args:
        model: a ``GPTModel`` before it is wrapped.
        seed: any integer.
        std: ``--init-method-std``.
        embedding_std: ``--embedding-init-method-std``, of word and position embedding; ``None``: like all matrices.
        xavier: ``--init-method-xavier-uniform``: all matrices from Glorot's uniform distribution, but for an embedding
            with a standard deviation of its own.
    """
    norm = 0.0 if model.config.layernorm_zero_centered_gamma else 1.0
    residual_std = std / math.sqrt(2 * model.config.num_layers)
    for shard in shards_of(model):
        if is_adapter(shard.key):
            continue
        scale = residual_std if ".linear_proj." in shard.key or ".linear_fc2." in shard.key else std
        if embedding_std is not None and shard.key.startswith("embedding."):
            scale = embedding_std
        elif xavier:
            scale = None
        shard.data.copy_(_draw(shard, seed, scale, norm))


@torch.no_grad()
def initialize_adapters(model: torch.nn.Module, seed: int) -> None:
    """Draw the matrices of adapters, in place: A as PEFT does, B 0, so that they begin as no change at all."""
    for shard in shards_of(model):
        if shard.key.endswith(LORA_B):
            shard.data.zero_()
        elif is_adapter(shard.key):
            bound = bound_of_a(shard.global_shape[-1])
            shard.data.copy_(
                _part_of_whole(
                    shard, seed, lambda whole, generator, b=bound: whole.uniform_(-b, b, generator=generator)
                )
            )


def mark_split_weights(model: torch.nn.Module) -> None:
    """Say which weights are split over tensor-parallel ranks; Megatron does so only when it draws them itself.

    Without the mark the gradient norm counts one rank's part of each weight.
    """
    for module in model.modules():
        axis = next((axis for kind, axis in SPLIT_AXIS.items() if isinstance(module, kind)), None)
        if axis is not None and module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(module.weight, True, axis, 1)


def _draw(shard: ShardedTensor, seed: int, std: float | None, norm: float) -> Tensor:
    """This rank's part of a parameter; ``std``: of a matrix, ``None`` for Glorot's bounds."""
    if shard.key.endswith("bias"):
        return torch.zeros_like(shard.data)
    if "norm" in shard.key:
        return torch.full_like(shard.data, norm)
    if std is None:
        return _part_of_whole(
            shard, seed, lambda whole, generator: torch.nn.init.xavier_uniform_(whole, generator=generator)
        )
    return _part_of_whole(shard, seed, lambda whole, generator: whole.normal_(0.0, std, generator=generator))


def _part_of_whole(shard: ShardedTensor, seed: int, draw: Callable[[Tensor, torch.Generator], object]) -> Tensor:
    """This rank's part of a parameter that is drawn as a whole, in place, from a random stream of its own."""
    stacked = shard.prepend_axis_num  # leading axes of the checkpoint that count layers
    name = f"{seed}/{shard.key}/{shard.global_offset[:stacked]}"
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1)
    whole = torch.empty(shard.global_shape[stacked:])
    draw(whole, generator)
    part = tuple(
        slice(start, start + length)
        for start, length in zip(shard.global_offset[stacked:], shard.data.shape, strict=True)
    )
    return whole[part].to(shard.data)
