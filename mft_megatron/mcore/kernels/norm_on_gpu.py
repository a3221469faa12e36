"""RMSNorm and layer norm by Triton's kernels, for dtypes and weights that torch's kernels do not have.

::

    y = (x - m) · r · (w + shift) + b      m: mean, 0 for RMSNorm;  r = (mean((x - m)²) + eps)^-½

Computed in fp32 and rounded once, whatever dtypes input and weight have. H: elements that are normalised.
"""

import torch
from torch import Tensor

from mft_megatron.mcore.platform import devices

from . import norm_triton, triton_support


def takes(hidden: Tensor) -> bool:
    """Whether the kernels can normalise this tensor, [..., H], on this machine; references in fp64 are not for them."""
    wanted = devices.on_gpu(hidden) and hidden.dtype != torch.float64 and hidden.shape[-1] <= norm_triton.LONGEST_ROW
    return wanted and triton_support.obstacle(hidden.device) is None


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, eps: float, shift: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Normalise.

    Args:
        hidden: [..., H].
        weight: [H].
        bias: [H] for layer norm; ``None`` for RMSNorm.
        eps: added to the mean of squares.
        shift: added to the weight.

    Returns:
        the result, [..., H] in the weight's dtype; means, or ``None``, and r, each fp32 [..., 1].
    """
    normed = torch.empty_like(hidden, dtype=weight.dtype, memory_format=torch.contiguous_format)
    scale = hidden.new_empty((*hidden.shape[:-1], 1), dtype=torch.float32)
    mean = None if bias is None else torch.empty_like(scale)
    if not hidden.is_meta and hidden.numel():
        norm_triton.launch_forward(_rows(hidden), weight, bias, normed, mean, scale, eps, shift)
    return normed, mean, scale


def backward(
    gradient: Tensor, hidden: Tensor, weight: Tensor, mean: Tensor | None, scale: Tensor, shift: float, trained: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Differentiate.

    Args:
        gradient: [..., H], of the result.
        hidden: as in forward.
        weight: as in forward.
        mean: from forward.
        scale: from forward.
        shift: as in forward.
        trained: whether weight or bias needs a gradient.

    Returns:
        gradients of hidden, weight and bias in their dtypes; ``None`` of what is not trained or not there.
    """
    of_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    sums = None
    if trained:
        size = hidden.shape[-1]
        programs = norm_triton.backward_programs(hidden.numel() // size, size)
        sums = hidden.new_empty((1 if mean is None else 2, programs, size), dtype=torch.float32)
    if not hidden.is_meta and hidden.numel():
        norm_triton.launch_backward(_rows(gradient), _rows(hidden), weight, mean, scale, of_hidden, sums, shift)
    if sums is None:
        return of_hidden, None, None
    totals = sums.sum(1).to(weight.dtype)
    return of_hidden, totals[0], None if mean is None else totals[1]


def _rows(value: Tensor) -> Tensor:
    """View [..., H] as [rows, H] with neighbouring elements; a copy where it is no such view."""
    rows = value.reshape(-1, value.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
