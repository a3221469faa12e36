"""Errors of the Triton kernels against fp64, run by Triton's interpreter on the CPU; prints JSON by case.

Run by test_triton_kernels.py with ``TRITON_INTERPRET=1``, which Triton reads when it is imported.
"""

import json
import sys

import torch

from mft_megatron.mcore.kernels.rotary import rotate_on_gpu
from tests.mcore.kernels import rotary_cases


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


if __name__ == "__main__":
    json.dump(rotary(), sys.stdout)
