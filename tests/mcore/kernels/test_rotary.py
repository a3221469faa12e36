"""Rotary embedding in PyTorch's operators equals the multiplication of complex numbers; what is kept of it on a GPU."""

import pytest
import torch

from mft_megatron.mcore.kernels import rotary, triton_support
from mft_megatron.mcore.kernels.rotary import Rotation, rotate
from mft_megatron.mcore.platform import devices
from tests.mcore.kernels import rotary_cases
from tests.mcore.kernels.saved import saved_bytes

CASES = {name: case for name, *case in rotary_cases.cases()}


@pytest.mark.parametrize("name", CASES)
def test_equals_complex_numbers(name):
    value, angles, interleaved = CASES[name]
    result = rotate(value, Rotation(angles, interleaved))
    assert (result.dtype, result.is_contiguous()) == (value.dtype, True)
    wanted = rotary_cases.expected(value, angles, interleaved)
    # cosines, products and sum are rounded to the dtype one after another
    assert (result.double() - wanted).abs().max() < 2 * torch.finfo(value.dtype).eps * wanted.abs().max()


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient(interleaved):
    value, angles = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True), torch.rand(3, 3).double()
    assert torch.autograd.gradcheck(lambda value: rotate(value, Rotation(angles, interleaved)), value)


def test_layers_share_what_is_kept():
    """A second layer keeps nothing more than the first one."""
    value, rotation = torch.randn(6, 2, 8).bfloat16().requires_grad_(), Rotation(torch.rand(6, 4), False)
    twice = saved_bytes(lambda: rotate(value, rotation) + rotate(value, rotation))
    assert twice == 2 * 2 * 6 * 4


@pytest.fixture
def simulated_kernel(monkeypatch):
    """Tensors that count as on a GPU with Triton; the kernel is replaced by the formula in fp64."""

    def formula(value, cos, sin, interleaved, back=False):
        assert value.dtype != torch.float64, "the kernel computes in fp32"
        angles = torch.atan2(-sin if back else sin, cos)
        return rotary_cases.expected(value, angles, interleaved).to(value.dtype)

    monkeypatch.setattr(devices, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(triton_support, "obstacle", lambda device: None)
    monkeypatch.setattr(rotary, "rotate_on_gpu", formula)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_kernels_gradient_is_the_rotation_back(simulated_kernel, interleaved):
    value, angles, gradient = torch.randn(5, 2, 12), torch.rand(5, 4), torch.randn(5, 2, 12)
    rotation, results = Rotation(angles, interleaved), []
    for of in (value.requires_grad_(), value.detach().double().requires_grad_()):
        results.append(torch.autograd.grad(rotate(of, rotation), of, gradient.to(of.dtype))[0])
    # fp64 is rotated by PyTorch's operators
    assert torch.allclose(results[0].double(), results[1], atol=1e-6)


def test_the_kernel_keeps_cosines_and_sines_alone(simulated_kernel):
    value, rotation = torch.randn(6, 2, 8).bfloat16().requires_grad_(), Rotation(torch.rand(6, 4), False)
    assert saved_bytes(lambda: rotate(value, rotation) + rotate(value, rotation)) == 2 * 4 * 6 * 4


def test_on_a_simulated_gpu_a_contiguous_tensor_is_made(monkeypatch):
    monkeypatch.setattr(devices, "on_gpu", lambda tensor: tensor.is_meta)
    monkeypatch.setattr(triton_support, "obstacle", lambda device: None)
    value = torch.empty(6, 2, 24, dtype=torch.bfloat16, device="meta")[..., :8].requires_grad_()
    result = rotate(value, Rotation(torch.empty(6, 4, device="meta"), False))
    assert (result.shape, result.dtype, result.is_contiguous()) == (value.shape, value.dtype, True)
    assert torch.autograd.grad(result.sum(), value)[0].shape == value.shape


def test_obstacles():
    assert triton_support.obstacle(torch.device("cpu")) == "there is no GPU"
    assert triton_support.obstacle(torch.device("meta")) is None
    # a GPU that no machine has: whatever the first launch says, in a line
    reason = triton_support.obstacle(torch.device("cuda", 99))
    assert "Error: " in reason
    assert "\n" not in reason
