"""Norm and clipping of gradients over all tensors at once, where neither Transformer Engine nor apex is installed.

Megatron-Core's replacement for their kernels reads the norm of each tensor on the host, up to 240 waits for the device
a step, and scales each tensor into a copy. These take a few launches, and nothing is read.

With Transformer Engine, releases from 0.17 on keep the norm on the device, so that the host would first read it after
the update, when the device has nothing left to do. It is read before the update in every release, once a step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def norm_of_all(
    chunk_size: int, overflow: Tensor, tensors: Sequence[Sequence[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """Compute the 2-norm of all tensors together, as apex's ``multi_tensor_l2norm`` does.

    Args:
        chunk_size: not used.
        overflow: not used.
        tensors: lists of gradients of one device, floating point.
        per_tensor: whether the norm of each is asked for, which Megatron-Core never does.

    Returns:
        fp32 [1], on their device; and no norms of single tensors.
    """
    norms = [norm for some in tensors for norm in torch._foreach_norm(list(some), 2, dtype=torch.float32)]
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None


def scale_all(chunk_size: int, overflow: Tensor, tensors: Sequence[Sequence[Tensor]], factor: float) -> None:
    """Multiply tensors by a factor, as apex's ``multi_tensor_scale`` does; in place where source and result are one.

    Args:
        chunk_size: not used.
        overflow: not used.
        tensors: the sources, and as many results of their shapes; floating point.
        factor: on the host.
    """
    sources, results = tensors
    pairs = list(zip(sources, results, strict=True))
    in_place = [result for source, result in pairs if source is result]
    if in_place:
        torch._foreach_mul_(in_place, factor)
    for source, result in pairs:
        if source is not result:
            torch.mul(source, factor, out=result)


def compute_at_once() -> None:
    """Let Megatron-Core compute norm and clipping of gradients with these functions, and read the norm before it clips.

    Only what it took from ``megatron.core.utils`` is replaced: kernels of Transformer Engine or apex stay.
    """
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = norm_of_all
    for module in (clip_grads, optimizer):
        if module.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
            module.multi_tensor_scale_impl = scale_all
    if hasattr(clip_grads, "multi_tensor_scale_tensor_impl"):
        clip_grads.multi_tensor_scale_tensor_impl = None
