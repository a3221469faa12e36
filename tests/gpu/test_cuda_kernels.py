"""Norms and rotary embedding on a GPU, in torch's and Triton's kernels, against fp64."""

import pytest
import torch

from tests.mcore.kernels import norm_cases, rotary_cases

NORMS = {name: case for name, *case in norm_cases.cases()}
ROTATIONS = {name: case for name, *case in rotary_cases.cases()}


def error_of_norm(name, device="cuda"):
    """Largest error of result and gradients, by the largest value, in units of the result's rounding."""
    from mft_megatron.mcore.kernels.layer_norm import layer_norm
    from mft_megatron.mcore.kernels.rms_norm import rms_norm

    hidden, weight, bias, gradient, shift = NORMS[name]
    values = [value.to(device).requires_grad_() for value in (hidden, weight, bias) if value is not None]
    norm = rms_norm if bias is None else layer_norm
    result = norm(*values, norm_cases.EPS, shift)
    results = [result, *torch.autograd.grad(result, values, gradient.to(device))]
    return largest(results, norm_cases.expected(hidden, weight, bias, gradient, shift))


def error_of_rotation(name, device="cuda"):
    """Largest error of result and gradient, in the same unit; the gradient of itself is the value rotated back."""
    from mft_megatron.mcore.kernels.rotary import Rotation, rotate

    value, angles, interleaved = ROTATIONS[name]
    on_device = value.to(device).requires_grad_()
    result = rotate(on_device, Rotation(angles.to(device), interleaved))
    results = [result, torch.autograd.grad(result, on_device, value.to(device))[0]]
    return largest(results, [rotary_cases.expected(value, by, interleaved) for by in (angles, -angles)])


def largest(results, wanted):
    pairs = [(result.detach().cpu(), value) for result, value in zip(results, wanted, strict=True)]
    return max(
        ((result.double() - value).abs().max() / value.abs().max()).item() / torch.finfo(result.dtype).eps
        for result, value in pairs
    )


@pytest.mark.parametrize("name", NORMS)
def test_norms(name):
    assert error_of_norm(name) < 6


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations(name):
    assert error_of_rotation(name) < 3


def test_triton_runs_here():
    from mft_megatron.mcore.kernels import triton_support

    assert triton_support.obstacle(torch.device("cuda", 0)) is None
