"""Matrix products of 16-bit factors in fp32: into a matrix of fp32, or added to one, such as a sum of gradients.

The products are exact in fp32 and summed there by matrix units; what differs is whether the result can be written as it
is. torch's ``out_dtype`` of ``mm`` and ``addmm`` lets a GPU do that:

====================  =========================================  ==========================================
torch                 ``out = left @ right``                     ``total += left @ right``
====================  =========================================  ==========================================
since 2.10 on a GPU   written in fp32                            added in fp32 in the same operation
2.8 and 2.9, GPU      written in fp32                            written in fp32 block by block, then added
2.6 and 2.7, GPU      rounded to 16 bits, then converted         the same, then added
on the CPU            factors converted to fp32 block by block   the same
====================  =========================================  ==========================================

Which row holds is asked by trying it once. Where all dtypes are equal, torch's plain product is taken.
"""

import functools

import torch
from torch import Tensor

from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.platform.optional_packages import importable

# apex's kernel that adds the gradient of a linear layer's weight to a sum in one operation
APEX_KERNEL = "fused_weight_gradient_mlp_cuda"
# Elements of a block of rows that is multiplied or converted before it is added: 32 MiB of fp32, which stay in the
# cache of an A100 or newer.
BLOCK_ELEMENTS = 2**23
MIN_BLOCK_ROWS = 256


@functools.cache
def writes_fp32(device: torch.device) -> bool:
    """Whether torch multiplies matrices of 16 bits on a device into one of fp32; waits for the device once."""
    factor, out = _operands(device)
    try:
        torch.mm(factor, factor, out_dtype=torch.float32, out=out)
    except (TypeError, RuntimeError) as error:
        return _refused(error)
    return out.is_meta or bool((out == len(factor)).all())


@functools.cache
def adds_in_fp32(device: torch.device) -> bool:
    """Whether torch adds a product of 16-bit matrices to one of fp32 in one operation; waits for the device once.

    torch 2.8 and 2.9 refuse a summand of another dtype than the factors.
    """
    factor, total = _operands(device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (TypeError, RuntimeError) as error:
        return _refused(error)
    return total.is_meta or bool((total == len(factor) + 1).all())


def takes_apex() -> bool:
    """Whether linear layers add gradients of weights by apex's kernel: only where torch needs two operations."""
    return devices.HAS_CUDA and not adds_in_fp32(devices.device()) and importable(APEX_KERNEL)


def _operands(device: torch.device) -> tuple[Tensor, Tensor]:
    """Ones of fp16, which every GPU multiplies, and of fp32, [16, 16]."""
    return torch.ones(16, 16, dtype=torch.float16, device=device), torch.ones(16, 16, device=device)


def _refused(error: Exception) -> bool:
    """Return that the dtypes were refused, or raise an error that says something else."""
    if "dtype" not in str(error):
        raise error
    return False


def multiply(left_MK: Tensor, right_KN: Tensor, out_MN: Tensor) -> None:
    """Compute ``out = left @ right`` in the dtype of ``out``.

    Args:
        left_MK: floating-point.
        right_KN: of the same dtype.
        out_MN: of the same dtype, or fp32 for factors of 16 bits; rows may be further apart than they are long.
    """
    if out_MN.dtype == left_MK.dtype:
        torch.mm(left_MK, right_KN, out=out_MN)
    elif not devices.on_gpu(out_MN):
        left_MK = left_MK.to(out_MN.dtype)
        for columns in _blocks(right_KN.shape[1], right_KN.shape[0]):
            torch.mm(left_MK, right_KN[:, columns].to(out_MN.dtype), out=out_MN[:, columns])
    elif writes_fp32(out_MN.device):
        torch.mm(left_MK, right_KN, out_dtype=out_MN.dtype, out=out_MN)
    else:
        out_MN.copy_(left_MK @ right_KN)


def add_product(total_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
    """Compute ``total += left @ right`` in the dtype of ``total``.

    Args:
        total_MN: of the factors' dtype, or fp32 for factors of 16 bits.
        left_MK: floating-point.
        right_KN: of the same dtype.
    """
    if not left_MK.shape[1]:
        return
    if total_MN.dtype == left_MK.dtype:
        total_MN.addmm_(left_MK, right_KN)
        return
    on_gpu = devices.on_gpu(total_MN)
    if on_gpu and adds_in_fp32(total_MN.device):
        torch.addmm(total_MN, left_MK, right_KN, out_dtype=total_MN.dtype, out=total_MN)
        return
    if not on_gpu:
        right_KN = right_KN.to(total_MN.dtype)
    for rows in _blocks(len(total_MN), max(total_MN.shape[1], left_MK.shape[1])):
        if not on_gpu:
            total_MN[rows].addmm_(left_MK[rows].to(total_MN.dtype), right_KN)
        elif writes_fp32(total_MN.device):
            total_MN[rows] += torch.mm(left_MK[rows], right_KN, out_dtype=total_MN.dtype)
        else:
            total_MN[rows] += left_MK[rows] @ right_KN


def add_weight_gradient(input_TH: Tensor, gradient_TV: Tensor, total_VH: Tensor) -> None:
    """Add the gradient of a linear layer's weight to its sum.

    Args:
        input_TH: of the layer.
        gradient_TV: of the layer's output, of the same dtype.
        total_VH: the weight's ``main_grad``, of this dtype or fp32.
    """
    add_product(total_VH, gradient_TV.t(), input_TH)


def describe() -> str:
    """Describe in words how this process adds products to a sum in fp32."""
    if not devices.HAS_CUDA or adds_in_fp32(devices.device()):
        return "in fp32"
    if writes_fp32(devices.device()):
        return "in fp32, by a second operation (torch 2.10 needs one)"
    return "rounded to 16 bits before they are added (torch 2.8 keeps fp32)"


def _blocks(length: int, width: int) -> list[slice]:
    """Slices of ``length`` rows or columns of ``width`` elements each."""
    step = max(BLOCK_ELEMENTS // max(width, 1), MIN_BLOCK_ROWS)
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]
