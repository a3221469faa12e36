"""Layer norm of an input whose dtype is not the weight's, or with a shifted weight, without a wide copy of the input.

torch's layer norm keeps only its input, means and deviations where all dtypes are the same. Where the input has to be
converted first, it would keep the converted copy.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import norm_on_gpu
from .rms_norm import widened


def layer_norm(hidden: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: float = 0.0) -> Tensor:
    """Normalise the last dimension, scale it by ``weight + shift`` and add the bias.

    Args:
        hidden: [..., H]; its dtype may be a wider one than the weight's, as a residual stream in fp32.
        weight: [H].
        bias: [H].
        eps: added to the variance.
        shift: added to the weight, in fp32.

    Returns:
        [..., H] in the weight's dtype, computed in fp32, or in fp64 for an input in fp64.
    """
    if not shift and hidden.dtype == weight.dtype:
        return torch.nn.functional.layer_norm(hidden, weight.shape, weight, bias, eps)
    return _LayerNorm.apply(hidden, weight, bias, eps, shift)


class _LayerNorm(torch.autograd.Function):
    """Triton's kernel on a GPU, else torch's layer norm of values that are widened again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: float) -> Tensor:
        ctx.shift, ctx.on_gpu = shift, norm_on_gpu.takes(hidden)
        if ctx.on_gpu:
            normed, mean, scale = norm_on_gpu.forward(hidden, weight, bias, eps, shift)
            ctx.save_for_backward(hidden, weight, bias, mean, scale)
            return normed
        normed, mean, scale = torch.ops.aten.native_layer_norm(
            widened(hidden), list(weight.shape), widened(weight) + shift, widened(bias), eps
        )
        ctx.save_for_backward(hidden, weight, bias, mean, scale)
        return normed.to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, mean, scale = ctx.saved_tensors
        if ctx.on_gpu:
            trained = any(ctx.needs_input_grad[1:3])
            gradients = norm_on_gpu.backward(gradient, hidden, weight, mean, scale, ctx.shift, trained)
            return *gradients, None, None
        gradients = torch.ops.aten.native_layer_norm_backward(
            widened(gradient), widened(hidden), list(weight.shape), mean, scale,
            widened(weight) + ctx.shift, widened(bias), list(ctx.needs_input_grad[:3]),
        )  # fmt: skip
        converted = (
            None if of_it is None else of_it.to(value.dtype)
            for of_it, value in zip(gradients, (hidden, weight, bias), strict=True)
        )
        return *converted, None, None
