"""torch's matrix products into fp32 as they are on a GPU, on the CPU: which arguments each release takes.

Follows ``_mm_dtype_out_cuda`` and ``_addmm_dtype_out_cuda`` in ``aten/src/ATen/native/cuda/Blas.cpp`` of torch 2.9 and
2.10.
"""

import functools

import torch

from mft_megatron.mcore.kernels import mixed_products
from mft_megatron.mcore.platform import devices

# the first release of each kind
RELEASES = ("2.6", "2.8", "2.10")


class Products:
    """``torch.mm`` and ``torch.addmm`` of a release; they note calls that write another dtype than the factors'."""

    def __init__(self, release):
        self.release, self.calls = release, []
        self.plain = {"mm": torch.mm, "addmm": torch.addmm}

    def mm(self, left, right, *, out_dtype=None, out=None):
        if out_dtype is None:
            return self.plain["mm"](left, right, out=out)
        if self.release == "2.6":
            raise TypeError("mm() got an unexpected keyword argument 'out_dtype'")
        self._check(left, right, out_dtype, out)
        out = torch.empty(len(left), right.shape[1], dtype=out_dtype) if out is None else out
        self.calls.append(("mm", tuple(out.shape)))
        return out.copy_(left.double() @ right.double())

    def addmm(self, summand, left, right, *, alpha=1, beta=1, out_dtype=None, out=None):
        if out_dtype is None:
            return self.plain["addmm"](summand, left, right, alpha=alpha, beta=beta, out=out)
        if self.release == "2.6":
            raise TypeError("addmm() got an unexpected keyword argument 'out_dtype'")
        self._check(left, right, out_dtype, out)
        allowed = (right.dtype,) if self.release == "2.8" else (right.dtype, out_dtype)
        if summand.dtype not in allowed:
            raise RuntimeError(f"self and mat2 must have the same dtype, but got {summand.dtype} and {right.dtype}")
        self.calls.append(("addmm", tuple(out.shape)))
        return out.copy_(beta * summand.double() + alpha * (left.double() @ right.double()))

    @staticmethod
    def _check(left, right, out_dtype, out):
        if left.dtype != right.dtype:
            raise RuntimeError("input dtypes must be the same")
        if out is not None and out.dtype != out_dtype:
            raise RuntimeError("out_dtype must be the same as the dtype of the provided out tensor")
        if out_dtype != left.dtype and (out_dtype != torch.float32 or left.dtype not in (torch.half, torch.bfloat16)):
            raise RuntimeError("out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs")


def install(monkeypatch, release):
    """Let tensors of the CPU count as a GPU's, and replace torch's functions by those of a release; returns them."""
    products = Products(release)
    monkeypatch.setattr(devices, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(devices, "HAS_CUDA", True)
    monkeypatch.setattr(devices, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch, "mm", products.mm)
    monkeypatch.setattr(torch, "addmm", products.addmm)
    forget(monkeypatch)
    return products


def forget(monkeypatch):
    """Let the product functions try again what torch can do, now and after the test."""
    for function in (mixed_products.writes_fp32, mixed_products.adds_in_fp32):
        function.cache_clear()
        monkeypatch.setattr(mixed_products, function.__name__, functools.cache(function.__wrapped__))
