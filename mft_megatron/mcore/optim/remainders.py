"""fp32 main weights as Transformer Engine's fused Adam keeps them beside bf16 weights: their lower 16 bits alone.

The upper 16 bits are those of the weight, rounded to the nearest, halves away from zero: a lower half with its highest
bit set has raised the weight by one unit, which is taken back to read the main weight. Read from
``multi_tensor/adam.cu`` of Transformer Engine 2.11.
"""

import torch
from torch import Tensor


def join_remainders(weights: Tensor, remainders: Tensor) -> Tensor:
    """Main weights, fp32 with the shape of both.

    Args:
        weights: bf16.
        remainders: their lower halves, int16.
    """
    remainders = remainders.int()
    upper = weights.view(torch.int16).int() - (remainders < 0).int()
    return ((upper << 16) | (remainders & 0xFFFF)).view(torch.float32)


def split_remainders(main: Tensor) -> tuple[Tensor, Tensor]:
    """Weights, bf16, and the lower halves of the main weights, int16, from which the main weights are read again.

    Args:
        main: fp32, contiguous.
    """
    bits = main.view(torch.int32)
    # a conversion to a smaller integer keeps the lower bits
    remainders = bits.to(torch.int16)
    upper = (bits >> 16) + (remainders < 0).int()
    return upper.to(torch.int16).view(torch.bfloat16), remainders
