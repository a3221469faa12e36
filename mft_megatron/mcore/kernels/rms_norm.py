"""Root-mean-square norm that keeps its input and one number a token for the backward pass.

::

    y = x · r · (w + shift)      r = (mean(x²) + eps)^-½

Written with torch's operators, a norm in bf16 would keep an fp32 copy of its input and the normed value too: six bytes
more for each element of the hidden state. Sums are in fp32, or in fp64 for an input in fp64. T: tokens, H: elements
that are normalised.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mft_megatron.mcore.platform import devices

from . import norm_on_gpu


class Kernel(NamedTuple):
    """An implementation; all take and return the same.

    Attributes:
        forward: (hidden [..., H], weight [H], eps, shift) -> the result, [..., H] in the weight's dtype, and r,
            [..., 1] in fp32 or fp64.
        backward: (gradient [..., H] in the weight's dtype, hidden, weight, r, shift, whether the weight is trained) ->
            gradients of hidden and of weight in their dtypes; the second may be anything where it is not trained.
    """

    forward: Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor | None]]


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, shift: float = 0.0) -> Tensor:
    """Normalise the last dimension and scale it by ``weight + shift``.

    Args:
        hidden: [..., H]; its dtype may be a wider one than the weight's, as a residual stream in fp32.
        weight: [H].
        eps: added to the mean of squares.
        shift: added to the weight, in fp32: 1 + weight in bf16 would lose digits.

    Returns:
        [..., H] in the weight's dtype.
    """
    return _RMSNorm.apply(hidden, weight, eps, shift)


def widened(value: Tensor) -> Tensor:
    """Convert to fp32 for computing; fp64, in which references of the engine are computed, stays."""
    return value if value.dtype == torch.float64 else value.float()


def has_torchs_kernel() -> bool:
    """Whether this torch has a kernel of RMSNorm for CUDA, with its backward pass: since 2.9."""
    return hasattr(torch.ops.aten, "_fused_rms_norm_backward")


def choose(hidden: Tensor, weight: Tensor, shift: float) -> Kernel:
    """Choose the implementation for these tensors: on a GPU torch's kernel if it can compute this, else Triton's."""
    same = hidden.dtype == weight.dtype and not shift
    if devices.on_gpu(hidden) and same and has_torchs_kernel():
        return TORCH
    return TRITON if norm_on_gpu.takes(hidden) else PLAIN


class _RMSNorm(torch.autograd.Function):
    """One node for the input's several uses, so that a recomputed norm gives the same gradient, bit for bit."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float, shift: float) -> Tensor:
        ctx.kernel, ctx.shift = choose(hidden, weight, shift), shift
        normed, scale = ctx.kernel.forward(hidden, weight, eps, shift)
        ctx.save_for_backward(hidden, weight, scale)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, scale = ctx.saved_tensors
        trained = ctx.needs_input_grad[1]
        of_hidden, of_weight = ctx.kernel.backward(gradient, hidden, weight, scale, ctx.shift, trained)
        return of_hidden if ctx.needs_input_grad[0] else None, of_weight if trained else None, None, None


def _plain_forward(hidden: Tensor, weight: Tensor, eps: float, shift: float) -> tuple[Tensor, Tensor]:
    wide = widened(hidden)
    scale = (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    normed = wide * scale
    if shift:
        return (normed * (widened(weight) + shift)).to(weight.dtype), scale
    # rounded before it is multiplied, as in Hugging Face's Llama
    return normed.to(weight.dtype) * weight, scale


def _plain_backward(
    gradient: Tensor, hidden: Tensor, weight: Tensor, scale: Tensor, shift: float, trained: bool
) -> tuple[Tensor, Tensor | None]:
    """Differentiate in the order in which torch's operators do; in fp32 the result has the same bits."""
    wide, gradient = widened(hidden), widened(gradient)
    of_weight = None
    if trained:
        normed = wide * scale
        rounded = normed if shift else normed.to(weight.dtype).to(normed.dtype)
        of_weight = (gradient * rounded).sum_to_size(weight.shape).to(weight.dtype)
    of_normed = gradient * (widened(weight) + shift)
    of_scale = (of_normed * wide).sum(-1, keepdim=True)
    of_mean = -0.5 * of_scale * scale.pow(3) / hidden.shape[-1]
    of_hidden = of_normed * scale + of_mean * (2.0 * wide)
    return of_hidden.to(hidden.dtype), of_weight


def _torch_forward(hidden: Tensor, weight: Tensor, eps: float, shift: float) -> tuple[Tensor, Tensor]:
    if hidden.is_meta:  # torch describes it there by the operators that its kernel replaces
        return torch.empty_like(hidden), hidden.new_empty((*hidden.shape[:-1], 1), dtype=widened(hidden[:0]).dtype)
    return torch.ops.aten._fused_rms_norm(hidden, [hidden.shape[-1]], weight, eps)


def _torch_backward(
    gradient: Tensor, hidden: Tensor, weight: Tensor, scale: Tensor, shift: float, trained: bool
) -> tuple[Tensor, Tensor | None]:
    if hidden.is_meta:
        return torch.empty_like(hidden), torch.empty_like(weight) if trained else None
    mask = [True, trained]
    shape = [hidden.shape[-1]]
    return torch.ops.aten._fused_rms_norm_backward(gradient, hidden, shape, scale, weight, mask)


def _triton_forward(hidden: Tensor, weight: Tensor, eps: float, shift: float) -> tuple[Tensor, Tensor]:
    normed, _, scale = norm_on_gpu.forward(hidden, weight, None, eps, shift)
    return normed, scale


def _triton_backward(
    gradient: Tensor, hidden: Tensor, weight: Tensor, scale: Tensor, shift: float, trained: bool
) -> tuple[Tensor, Tensor | None]:
    return norm_on_gpu.backward(gradient, hidden, weight, None, scale, shift, trained)[:2]


PLAIN = Kernel(_plain_forward, _plain_backward)
# on CUDA; rounded once, after the multiplication
TORCH = Kernel(_torch_forward, _torch_backward)
TRITON = Kernel(_triton_forward, _triton_backward)
