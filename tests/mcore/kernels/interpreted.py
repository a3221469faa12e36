"""Errors of the Triton kernels against fp64, run by Triton's interpreter on the CPU; prints JSON by case.

Run by test_triton_kernels.py with ``TRITON_INTERPRET=1``, which Triton reads when it is imported.
"""

import json
import sys

import torch

from mft_megatron.mcore.kernels import layer_norm, norm_triton, rms_norm, triton_support
from mft_megatron.mcore.kernels.rotary import rotate_on_gpu
from mft_megatron.mcore.platform import devices
from tests.mcore.kernels import norm_cases, rotary_cases


def relative_error(result, expected):
    """Largest difference by the largest value, in units of the rounding of the result's dtype."""
    error = (result.double() - expected).abs().max() / expected.abs().max()
    return error.item() / torch.finfo(result.dtype).eps


def rotary():
    """Errors of the rotation and of the rotation back of every case."""
    errors = {}
    for name, value, angles, interleaved in rotary_cases.cases():
        for back in (False, True):
            result = rotate_on_gpu(value, angles.cos(), angles.sin(), interleaved, back)
            assert result.is_contiguous()
            assert result.dtype == value.dtype
            wanted = rotary_cases.expected(value, -angles if back else angles, interleaved)
            errors[f"rotary {name} {back}"] = relative_error(result, wanted)
    return errors


def norms():
    """Largest errors of results and gradients of every case, as models call them on a GPU."""
    devices.on_gpu, triton_support.obstacle = lambda tensor: True, lambda device: None
    # torch has no kernel of its own on the CPU
    rms_norm.TORCH = rms_norm.TRITON
    # so that each has several blocks of rows
    norm_triton.BACKWARD_PROGRAMS = 2
    errors = {}
    for name, hidden, weight, bias, gradient, shift in norm_cases.cases():
        values = [value.requires_grad_() for value in (hidden, weight, bias) if value is not None]
        norm = rms_norm._RMSNorm if bias is None else layer_norm._LayerNorm
        result = norm.apply(*values, norm_cases.EPS, shift)
        results = [result, *torch.autograd.grad(result, values, gradient)]
        assert [value.dtype for value in results] == [weight.dtype, *(value.dtype for value in values)]
        frozen = norm.apply(hidden, *(value.detach() for value in values[1:]), norm_cases.EPS, shift)
        assert torch.autograd.grad(frozen, hidden, gradient)[0].equal(results[1])
        wanted = norm_cases.expected(*(value.detach() for value in (hidden, weight)), bias, gradient, shift)
        errors[f"norm {name}"] = max(relative_error(*pair) for pair in zip(results, wanted, strict=True))
    return errors


if __name__ == "__main__":
    json.dump(rotary() | norms(), sys.stdout)
