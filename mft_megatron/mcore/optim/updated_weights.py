"""The weights that an optimizer of this rank updates, one chained optimizer after another."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from collections.abc import Iterator

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor
from torch.nn import Parameter


def parts_of(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Chained optimizers, without those that have no parameters; Megatron has a separate one for experts."""
    return [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]


def weights_of(part: MegatronOptimizer) -> Iterator[Parameter]:
    """Weights of this rank that the optimizer updates, whole or the rank's slices of them."""
    if isinstance(part, DistributedOptimizer):
        for buffer in part.buffers:
            for bucket in buffer.buckets:
                yield from (weight for weight in buffer.param_index_map if weight in bucket.params)
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        for halves, wholes in zip(part.float16_groups, part.fp32_from_fp32_groups, strict=True):
            yield from halves
            yield from wholes
    else:
        yield from part.get_parameters()


def main_of(weight: Parameter) -> Tensor:
    """The tensor that the optimizer updates: an fp32 copy of the weight, or the weight itself where it is fp32."""
    return getattr(weight, "main_param", weight)
