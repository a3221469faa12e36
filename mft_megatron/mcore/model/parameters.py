"""Sums over all weights of a model, each counted once over all ranks."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import math
from collections.abc import Callable, Iterable

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from mft_megatron.mcore.adapters.quantized_linear import QuantizedLinear, quantized_layers
from mft_megatron.mcore.parallel.process_groups import sum_over_world
from mft_megatron.mcore.platform import devices


def count_parameters(chunks: Iterable[torch.nn.Module], trained: bool = False) -> int:
    """Count the parameters of the whole model over all ranks, each once; a collective.

    Args:
        chunks: this rank's chunks of the model.
        trained: count trained parameters alone.
    """
    counted = _sum_over_weights(
        chunks,
        lambda weight: weight.numel() * (weight.requires_grad or not trained),
        lambda layer: 0 if trained else layer.weight.numel(),
    )
    return round(counted)


def weight_norm(chunks: Iterable[torch.nn.Module]) -> float:
    """Compute the L2 norm of all weights of the model over all ranks, each counted once, in fp64; a collective."""

    def squared(weight: Tensor) -> float:
        return weight.detach().double().square().sum().item()

    def squared_quantized(layer: QuantizedLinear) -> float:
        return squared(layer.weight_or_raise().dequantize(torch.float32))

    return math.sqrt(_sum_over_weights(chunks, squared, squared_quantized))


def _sum_over_weights(
    chunks: Iterable[torch.nn.Module],
    value: Callable[[Tensor], float],
    value_of_quantized: Callable[[QuantizedLinear], float],
) -> float:
    """Sum a value of each weight of the model, whether it is a parameter or kept in 4 bits."""
    # number of ranks that have a copy, by Megatron-Core's mark "allreduce": experts are split over data-parallel ranks
    copies = {
        True: parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        False: parallel_state.get_expert_data_parallel_world_size(),
    }
    totals = dict.fromkeys(copies, 0.0)
    for chunk in chunks:
        for parameter in chunk.parameters():
            counted = tensor_parallel.param_is_not_tensor_parallel_duplicate(parameter)
            if counted and not getattr(parameter, "shared", False):
                totals[getattr(parameter, "allreduce", True)] += value(parameter)
        # each tensor-parallel rank has a different shard of a quantised weight
        totals[True] += sum(map(value_of_quantized, quantized_layers(chunk).values()))
    over_ranks = sum_over_world(torch.tensor(list(totals.values()), device=devices.device(), dtype=torch.float64))
    return sum(total / size for total, size in zip(over_ranks.tolist(), copies.values(), strict=True))
