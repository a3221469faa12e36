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
    """Parameters of the whole model over all ranks, each counted once, or those of them that are ``trained``.

    ``chunks`` are this rank's part.
    """
    counted = _of_all_weights(
        chunks,
        lambda weight: weight.numel() * (weight.requires_grad or not trained),
        lambda layer: 0 if trained else layer.weight.numel(),
    )
    return round(counted)


def weight_norm(chunks: Iterable[torch.nn.Module]) -> float:
    """L2 norm of all weights of the model over all ranks, each counted once, in fp64; a collective."""

    def squared(weight: Tensor) -> float:
        return weight.detach().double().square().sum().item()

    return math.sqrt(_of_all_weights(chunks, squared, lambda layer: squared(layer.quantized.dequantize(torch.float32))))


def _of_all_weights(
    chunks: Iterable[torch.nn.Module],
    number: Callable[[Tensor], float],
    of_quantized: Callable[[QuantizedLinear], float],
) -> float:
    """The sum of a number of each weight of the model, whether it is a parameter or kept in 4 bits."""
    # by how many ranks have the same: experts are shared out among data-parallel ranks
    copies = {
        True: parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        False: parallel_state.get_expert_data_parallel_world_size(),
    }
    mine = dict.fromkeys(copies, 0)
    for chunk in chunks:
        for parameter in chunk.parameters():
            counted = tensor_parallel.param_is_not_tensor_parallel_duplicate(parameter)
            if counted and not getattr(parameter, "shared", False):
                mine[getattr(parameter, "allreduce", True)] += number(parameter)
        # of those each tensor-parallel rank has a part of its own
        mine[True] += sum(map(of_quantized, quantized_layers(chunk).values()))
    total = sum_over_world(torch.tensor(list(mine.values()), device=devices.device(), dtype=torch.float64))
    return sum(count / size for count, size in zip(total.tolist(), copies.values(), strict=True))
