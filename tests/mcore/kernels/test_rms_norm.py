"""The root-mean-square norm equals its formula in fp64 and, in fp32, torch's operators bit for bit."""

import pytest
import torch

from mft_megatron.mcore.kernels import rms_norm as module
from mft_megatron.mcore.kernels import triton_support
from mft_megatron.mcore.kernels.norm_triton import LONGEST_ROW
from mft_megatron.mcore.kernels.rms_norm import PLAIN, TORCH, TRITON, choose, rms_norm
from mft_megatron.mcore.platform import devices
from tests.mcore.kernels.saved import saved_bytes

EPS = 1e-5
# input, weight; the second is that of a residual stream in fp32
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
]


def operands(hidden_dtype=torch.float32, weight_dtype=torch.float32, shape=(7, 3, 48)):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(shape, generator=generator) * torch.rand((*shape[:-1], 1), generator=generator) * 9
    weight, gradient = torch.rand(shape[-1:], generator=generator) + 0.5, torch.randn(shape, generator=generator)
    return hidden.to(hidden_dtype).requires_grad_(), weight.to(weight_dtype).requires_grad_(), gradient.to(weight_dtype)


def with_torchs_operators(hidden, weight, eps, shift):
    """The same norm as a graph of torch's operators, each of which keeps what it needs."""
    hidden = hidden.view_as(hidden)
    normed = torch.nn.functional.rms_norm(module.widened(hidden), weight.shape, None, eps)
    if shift:
        return (normed * (module.widened(weight) + shift)).to(weight.dtype)
    return normed.to(weight.dtype) * weight


def differentiated(norm, hidden, weight, gradient, shift=0.0):
    output = norm(hidden, weight, EPS, shift)
    return output.detach(), *torch.autograd.grad(output, (hidden, weight), gradient)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_gradients_in_fp64(shift):
    hidden, weight, _ = operands(torch.float64, torch.float64, (3, 2, 8))
    assert torch.autograd.gradcheck(lambda *values: rms_norm(*values, EPS, shift), (hidden, weight))


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_fp32_has_the_bits_of_torchs_operators(shift):
    ours, theirs = (differentiated(norm, *operands(), shift) for norm in (rms_norm, with_torchs_operators))
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_against_fp64(dtypes, shift):
    hidden, weight, gradient = operands(*dtypes)
    wide = [value.detach().double().requires_grad_() for value in (hidden, weight)]
    expected = differentiated(with_torchs_operators, *wide, gradient.double(), shift)
    results = differentiated(rms_norm, hidden, weight, gradient, shift)
    assert [value.dtype for value in results] == [dtypes[1], *dtypes]
    for result, value in zip(results, expected, strict=True):
        assert (result.double() - value).abs().max() < 4 * torch.finfo(dtypes[1]).eps * value.abs().max()


@pytest.mark.parametrize("dtypes", DTYPES)
def test_keeps_its_input_and_one_number_a_token(dtypes):
    hidden, weight, _ = operands(*dtypes)
    kept = saved_bytes(lambda: rms_norm(hidden, weight, EPS), hidden, weight)
    assert kept == 4 * hidden[..., 0].numel()
    with_a_graph = saved_bytes(lambda: with_torchs_operators(hidden, weight, EPS, 0.0), hidden, weight)
    assert with_a_graph > kept + hidden.numel()


def test_a_frozen_weight_has_no_gradient():
    hidden, weight, gradient = operands()
    rms_norm(hidden, weight.detach(), EPS).backward(gradient)
    assert hidden.grad.equal(differentiated(rms_norm, *operands())[1])


def test_choice(monkeypatch):
    bf16, fp32 = torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(2, 8)
    fp64, wide = torch.zeros(2, 8).double(), torch.zeros(2, LONGEST_ROW + 1)
    assert choose(bf16, bf16[0], 0.0) is PLAIN
    monkeypatch.setattr(devices, "on_gpu", lambda tensor: True)
    for obstacle, other in ((None, TRITON), ("Triton is not installed", PLAIN)):
        monkeypatch.setattr(triton_support, "obstacle", lambda device, obstacle=obstacle: obstacle)
        has_kernel = hasattr(torch.ops.aten, "_fused_rms_norm_backward")
        assert choose(bf16, bf16[0], 0.0) is (TORCH if has_kernel else other)
        assert choose(bf16, bf16[0], 1.0) is other
        assert choose(fp32, bf16[0], 0.0) is other
        assert choose(fp64, fp64[0], 1.0) is PLAIN
        assert choose(wide, wide[0], 1.0) is PLAIN


@pytest.mark.skipif(not hasattr(torch.ops.aten, "_fused_rms_norm_backward"), reason="this torch has no such kernel")
def test_torchs_kernel_is_called_as_it_is_described(monkeypatch):
    """Its arguments and results, with torch's own decomposition in place of the CUDA kernel of the backward pass."""
    from torch._decomp import decomposition_table

    operator = torch.ops.aten._fused_rms_norm_backward.default
    calls = []

    def decomposed(*arguments):
        calls.append(arguments)
        return decomposition_table[operator](*arguments)

    monkeypatch.setattr(torch.ops.aten, "_fused_rms_norm_backward", decomposed)
    monkeypatch.setattr(devices, "on_gpu", lambda tensor: True)
    expected = differentiated(with_torchs_operators, *operands())
    for result, value in zip(differentiated(rms_norm, *operands()), expected, strict=True):
        assert torch.allclose(result, value, rtol=1e-5, atol=1e-6)
    assert len(calls) == 1
    names = [argument.name for argument in operator._schema.arguments]
    assert names == ["grad_out", "input", "normalized_shape", "rstd", "weight", "output_mask"]


@pytest.mark.parametrize("kernel", [TORCH, TRITON])
def test_on_a_simulated_gpu_results_have_shapes_and_dtypes(monkeypatch, kernel):
    monkeypatch.setattr(module, "choose", lambda *values: kernel)
    hidden, weight, gradient = operands(torch.bfloat16, torch.bfloat16)
    hidden, weight = (value.detach().to("meta").requires_grad_() for value in (hidden, weight))
    for result, like in zip(
        differentiated(rms_norm, hidden, weight, gradient.to("meta")), (hidden, hidden, weight), strict=True
    ):
        assert (result.shape, result.dtype) == (like.shape, like.dtype)
