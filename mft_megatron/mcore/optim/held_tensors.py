"""Tensors that a rank holds between steps: weights, gradients, and the optimizer's main weights and states."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses
from collections.abc import Iterator, Sequence

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mft_megatron.mcore.adapters.quantized_linear import quantized_layers


@dataclasses.dataclass(frozen=True)
class HeldTensors:
    """Tensors by what they are for; several may be views of one storage.

    Attributes:
        weights: parameters and buffers of the model, and the buffers that parameters are views of.
        gradients: buffers of gradients, and gradients outside of them.
        optimizer: main weights, and states of the optimizer; main weights in fp32 are views of the weights.
    """

    weights: list[Tensor]
    gradients: list[Tensor]
    optimizer: list[Tensor]


def held_tensors(chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> HeldTensors:
    """List what a rank holds.

    Args:
        chunks: the rank's chunks of the model.
        optimizer: over all of them.
    """
    weights = [tensor for chunk in chunks for tensor in (*chunk.module.parameters(), *chunk.module.buffers())]
    for chunk in chunks:
        for layer in quantized_layers(chunk.module).values():
            if layer.quantized is not None:
                weights += vars(layer.quantized).values()
    gradients = [p.grad for p in weights if p.grad is not None]
    for chunk in chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            gradients.append(buffer.grad_data)
            if buffer.param_data is not None:
                weights.append(buffer.param_data)
    return HeldTensors(weights, gradients, list(_of_optimizer(optimizer)))


def _of_optimizer(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if inner is None:
            continue
        for group in inner.param_groups:
            yield from group["params"]
        for state in inner.state.values():
            yield from (leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor))
