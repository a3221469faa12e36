"""Layer norm of mixed dtypes equals torch's of converted values, bit for bit, and keeps no converted input."""

import pytest
import torch

from mft_megatron.mcore.kernels import norm_on_gpu
from mft_megatron.mcore.kernels.layer_norm import layer_norm
from tests.mcore.kernels.saved import saved_bytes

EPS = 1e-5
CASES = {
    "shifted": (torch.float32, torch.float32, 1.0),
    "shifted bf16": (torch.bfloat16, torch.bfloat16, 1.0),
    "fp32 residual": (torch.float32, torch.bfloat16, 0.0),
    "shifted fp32 residual": (torch.float32, torch.bfloat16, 1.0),
    "shifted fp64": (torch.float64, torch.float64, 1.0),
    "plain": (torch.float32, torch.float32, 0.0),
}


def operands(hidden_dtype, weight_dtype):
    generator = torch.Generator().manual_seed(1)
    hidden, gradient = torch.randn(2, 7, 3, 48, generator=generator)
    weight, bias = torch.rand(2, 48, generator=generator)
    return [hidden.to(hidden_dtype), weight.to(weight_dtype), bias.to(weight_dtype)], gradient.to(weight_dtype)


def converted(hidden, weight, bias, eps, shift):
    """torch's layer norm of values that are converted first."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    hidden, scale, bias = hidden.to(wide), weight.to(wide) + shift, bias.to(wide)
    return torch.nn.functional.layer_norm(hidden, scale.shape, scale, bias, eps).to(weight.dtype)


def differentiated(norm, case):
    *dtypes, shift = CASES[case]
    values, gradient = operands(*dtypes)
    values = [value.requires_grad_() for value in values]
    output = norm(*values, EPS, shift)
    return output.detach(), *torch.autograd.grad(output, values, gradient)


@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case):
    ours, theirs = differentiated(layer_norm, case), differentiated(converted, case)
    assert all(map(torch.equal, ours, theirs))


def test_keeps_no_converted_input():
    (hidden, weight, bias), _ = operands(torch.bfloat16, torch.bfloat16)
    values = [value.requires_grad_() for value in (hidden, weight, bias)]
    tokens = hidden[..., 0].numel()
    assert saved_bytes(lambda: layer_norm(*values, EPS, 1.0), *values) == 2 * 4 * tokens
    assert saved_bytes(lambda: converted(*values, EPS, 1.0), *values) > 2 * hidden.nbytes


def test_on_a_simulated_gpu_results_have_shapes_and_dtypes(monkeypatch):
    monkeypatch.setattr(norm_on_gpu, "takes", lambda hidden: True)
    values, gradient = operands(torch.float32, torch.bfloat16)
    values = [value.to("meta").requires_grad_() for value in values]
    output = layer_norm(*values, EPS, 1.0)
    gradients = torch.autograd.grad(output, values, gradient.to("meta"))
    for result, like in zip((output, *gradients), (gradient, *values), strict=True):
        assert (result.shape, result.dtype) == (like.shape, like.dtype)


def test_frozen_parameters():
    (hidden, weight, bias), gradient = operands(torch.bfloat16, torch.bfloat16)
    layer_norm(hidden.requires_grad_(), weight, bias, EPS, 1.0).backward(gradient)
    assert hidden.grad.equal(differentiated(layer_norm, "shifted bf16")[1])
