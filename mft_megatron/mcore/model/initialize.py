"""Initial weights that depend on the seed alone, not on the parallel layout.

Megatron initialises weights rank by rank, so that another parallel layout gives another model (and with gated units
even its CPU initialisation differs between tensor-parallel sizes). Here each parameter has its own random stream,
seeded by the run's seed, the parameter's name in the checkpoint and its layer; a rank samples the whole parameter and
keeps its shard, which the sharded state dict describes.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import hashlib
import math

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor

from mft_megatron.lora import LORA_B, is_adapter
from mft_megatron.mcore.parallel.sharded_weights import shards_of

SPLIT_AXIS = {VocabParallelEmbedding: 0, ColumnParallelLinear: 0, RowParallelLinear: 1}


@torch.no_grad()
def initialize_weights(
    model: GPTModel, seed: int, std: float, embedding_std: float | None = None, xavier: bool = False
) -> None:
    """Initialise all weights of this rank's part of the model except adapters, in place.

    Matrices are normal with standard deviation ``std``; those that write into the residual stream
    (``linear_proj``, ``linear_fc2``) are scaled by ``1 / sqrt(2 · layers)``; biases are 0 and norm weights 1
    (0 where they are stored less 1): Megatron's defaults.

    Args:
        model: a ``GPTModel`` before it is wrapped.
        seed: any integer.
        std: ``--init-method-std``.
        embedding_std: ``--embedding-init-method-std``, for word and position embedding; ``None``: ``std``.
        xavier: ``--init-method-xavier-uniform``: sample all matrices from Glorot's uniform distribution, except
            embeddings where ``embedding_std`` is given.
    """
    norm = 0.0 if model.config.layernorm_zero_centered_gamma else 1.0
    residual_std = std / math.sqrt(2 * model.config.num_layers)
    for shard in shards_of(model):
        if is_adapter(shard.key):
            continue
        scale: float | None = residual_std if ".linear_proj." in shard.key or ".linear_fc2." in shard.key else std
        if embedding_std is not None and shard.key.startswith("embedding."):
            scale = embedding_std
        elif xavier:
            scale = None
        shard.data.copy_(_initial(shard, seed, scale, norm))


@torch.no_grad()
def initialize_adapters(model: GPTModel, seed: int) -> None:
    """Initialise the matrices of adapters, in place: A as PEFT does, B with 0, so that they change nothing at first."""
    for shard in shards_of(model):
        if shard.key.endswith(LORA_B):
            shard.data.zero_()
        elif is_adapter(shard.key):
            # Kaiming's bound with a = √5, as PEFT has it
            bound = 1 / math.sqrt(shard.global_shape[-1])
            whole, generator = _whole_parameter(shard, seed)
            shard.data.copy_(_own_shard(shard, whole.uniform_(-bound, bound, generator=generator)))


def mark_split_weights(model: torch.nn.Module) -> None:
    """Mark weights that are split over tensor-parallel ranks, as Megatron does only when it initialises them itself.

    Without the mark the gradient norm counts one rank's shard of each weight.
    """
    for module in model.modules():
        axis = next((axis for kind, axis in SPLIT_AXIS.items() if isinstance(module, kind)), None)
        if axis is not None and module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(module.weight, True, axis, 1)


def _initial(shard: ShardedTensor, seed: int, std: float | None, norm: float) -> Tensor:
    """Initial content of this rank's shard of a parameter.

    Args:
        shard: the shard; its ``data`` is the parameter's memory.
        seed: the run's seed.
        std: standard deviation of a matrix; ``None`` for Glorot's uniform distribution.
        norm: weight of norms.
    """
    if shard.key.endswith("bias"):
        return torch.zeros_like(shard.data)
    if "norm" in shard.key:
        return torch.full_like(shard.data, norm)
    whole, generator = _whole_parameter(shard, seed)
    if std is None:
        torch.nn.init.xavier_uniform_(whole, generator=generator)
    else:
        whole.normal_(0.0, std, generator=generator)
    return _own_shard(shard, whole)


def _whole_parameter(shard: ShardedTensor, seed: int) -> tuple[Tensor, torch.Generator]:
    """Uninitialised memory for the whole parameter of a shard, fp32 on the CPU, and its random stream."""
    stacked = shard.prepend_axis_num  # leading axes of the checkpoint's weight: the layer
    name = f"{seed}/{shard.key}/{shard.global_offset[:stacked]}"
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1)
    return torch.empty(shard.global_shape[stacked:]), generator


def _own_shard(shard: ShardedTensor, whole: Tensor) -> Tensor:
    """This rank's shard of a whole parameter, with dtype and device of the shard."""
    stacked = shard.prepend_axis_num
    region = tuple(
        slice(start, start + length)
        for start, length in zip(shard.global_offset[stacked:], shard.data.shape, strict=True)
    )
    return whole[region].to(shard.data)
