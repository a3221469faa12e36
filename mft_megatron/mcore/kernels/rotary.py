"""Rotary embedding: pairs of a head's elements are rotated by angles that depend on the token.

::

    halves       (x_i, x_{i + R/2})        a' = a cos - b sin
    interleaved  (x_{2i}, x_{2i + 1})      b' = b cos + a sin

On a GPU it is one kernel a tensor, forward and backward, and keeps nothing but the cosines and sines, which all layers
share. T: tokens, d: elements of a head, R: those of them that are rotated, from the first on.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mft_megatron.mcore.platform import devices

from . import triton_support


class Rotation:
    """Cosines and sines of the angles of a stream's tokens, converted once for all layers."""

    def __init__(self, angles: Tensor, interleaved: bool):
        """Compute cosines and sines.

        Args:
            angles: fp32 [T, R / 2].
            interleaved: whether the elements of a pair are neighbours, and not half of R apart.
        """
        self.interleaved = interleaved
        self._parts = {angles.dtype: (angles.cos(), angles.sin())}
        self._exact = angles.dtype

    def parts(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [T, R / 2], in a dtype; as they were computed without one."""
        dtype = dtype or self._exact
        if dtype not in self._parts:
            cos, sin = self._parts[self._exact]
            self._parts[dtype] = cos.to(dtype), sin.to(dtype)
        return self._parts[dtype]


def rotate(value: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the first R elements of each head: [T, heads, d] -> [T, heads, d], contiguous."""
    # references in fp64 run on a GPU, too, and the kernel computes in fp32
    if devices.on_gpu(value) and value.dtype != torch.float64 and triton_support.obstacle(value.device) is None:
        return _Rotate.apply(value, *rotation.parts(), rotation.interleaved)
    cos, sin = (part[:, None] for part in rotation.parts(value.dtype))
    rotated, rest = value.tensor_split([2 * cos.shape[-1]], -1)
    if rotation.interleaved:
        first, second = rotated[..., ::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, -1)
    pairs = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(pairs, -1).flatten(-2) if rotation.interleaved else torch.cat(pairs, -1)
    return torch.cat((rotated, rest), -1) if rest.shape[-1] else rotated


def rotate_on_gpu(value: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool = False) -> Tensor:
    """Rotate by the kernel, in fp32 and rounded once.

    Args:
        value: [T, heads, d], of any float dtype.
        cos: fp32 [T, R / 2], contiguous.
        sin: fp32 [T, R / 2], contiguous.
        interleaved: whether the elements of a pair are neighbours.
        back: rotate by the negative angles, which is the gradient's way.

    Returns:
        [T, heads, d], contiguous, in the dtype of ``value``.
    """
    if value.stride(-1) != 1:
        value = value.contiguous()
    result = torch.empty_like(value, memory_format=torch.contiguous_format)
    if not value.is_meta and value.numel():
        from .rotary_triton import launch

        launch(value, result, cos, sin, interleaved, back)
    return result


class _Rotate(torch.autograd.Function):
    """A rotation and, for the gradient, the rotation back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.interleaved = interleaved
        ctx.save_for_backward(cos, sin)
        return rotate_on_gpu(value, cos, sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate_on_gpu(gradient, cos, sin, ctx.interleaved, back=True), None, None, None
