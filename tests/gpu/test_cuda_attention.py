"""Every attention kernel that is available against dense attention in fp64, forward and backward."""

import numpy as np
import pytest
import torch

from mft_megatron.arguments.values.attention import AttentionShape
from mft_megatron.mcore.platform.precisions import BY_DTYPE
from tests.fake_kernels import dense

# queries and keys of each segment slice
SLICES = {
    "segments": ((7, 1, 160, 8, 64), (7, 1, 160, 8, 64)),
    "many": ((3,) * 200, (3,) * 200),
    "one long": ((2048,), (2048,)),
    "fewer queries than keys": ((128, 1, 70, 128), (128, 90, 300, 1024)),
}
HEADS = {"all heads": (8, 8), "grouped": (8, 2), "one group": (6, 1)}
# relative to the largest value: bf16 has 8 bits, fp16 11; both round the weights of each row once more
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}


def errors(kernel, lengths, heads, size, dtype, scale, window, device="cuda"):
    """Largest errors of output and gradients, relative to the largest value; inputs are rounded to ``dtype`` first."""
    from mft_megatron.mcore.parallel.attention_spans import Spans

    generator = torch.Generator().manual_seed(0)
    queries, keys = map(sum, lengths)
    shapes = [(queries, heads[0], size), (keys, heads[1], size), (keys, heads[1], size), (queries, heads[0], size)]
    rounded = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    ours = [tensor.to(device, copy=True).requires_grad_() for tensor in rounded[:3]]
    theirs = [tensor.double().requires_grad_() for tensor in rounded[:3]]
    spans = Spans.of(*map(np.array, lengths), device)
    output = kernel(*ours, spans, scale, window, 0.0)
    output.backward(rounded[3].to(device))
    expected = dense(*theirs, spans.cu_q.cpu(), spans.cu_k.cpu(), scale, (-1 if window is None else window, 0))
    expected.backward(rounded[3].double())
    pairs = [(output, expected), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
    assert all(a.dtype == dtype and a.shape == b.shape for a, b in pairs)
    ends = [(a.detach().cpu().double(), b.detach()) for a, b in pairs]
    return [float((a - b).abs().max() / b.abs().max()) for a, b in ends]


def kernel_of(backend, dtype, size):
    """The kernel of a backend; skips the test where it cannot compute this here."""
    from mft_megatron.mcore.attention.backends import choose, unavailable

    shape = AttentionShape(BY_DTYPE[dtype].name, size, grouped_queries=True)
    reason = unavailable(backend, shape)
    if reason is not None:
        pytest.skip(f"{backend} {reason}")
    return choose(backend, shape).kernel


@pytest.mark.parametrize("window", [None, 0, 5, 100])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", SLICES)
@pytest.mark.parametrize("backend", ["local", "varlen", "flash", "fused"])
def test_bf16(backend, case, heads, window, within):
    kernel = kernel_of(backend, torch.bfloat16, 64)
    worst = errors(kernel, SLICES[case], HEADS[heads], 64, torch.bfloat16, None, window)
    within(max(worst), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 16, 80, 128, 192, 256])
@pytest.mark.parametrize("backend", ["local", "varlen", "flash", "fused"])
def test_heads_of_all_sizes(backend, size, dtype, within):
    kernel = kernel_of(backend, dtype, size)
    worst = errors(kernel, SLICES["segments"], (4, 2), size, dtype, 0.3 * size**-0.5, None)
    within(max(worst), TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", SLICES)
def test_local_in_fp32(case, heads, window, within):
    kernel = kernel_of("local", torch.float32, 20)
    worst = errors(kernel, SLICES[case], HEADS[heads], 20, torch.float32, None, window)
    within(max(worst), TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", ["local", "flash", "fused"])
def test_dropout_keeps_the_mean(backend):
    """With values of 1 each output is the sum of a row's weights: 1 in the mean, but not in each row."""
    from mft_megatron.mcore.parallel.attention_spans import Spans

    kernel = kernel_of(backend, torch.bfloat16, 64)
    lengths = np.full(4, 512)
    query, key = (torch.randn(2048, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    value, spans = torch.ones_like(key), Spans.of(lengths, lengths, "cuda")
    dropped = kernel(query, key, value, spans, None, None, 0.25).float()
    assert abs(dropped.mean().item() - 1) < 0.02
    assert dropped.std() > 0.02
    torch.testing.assert_close(kernel(query, key, value, spans, None, None, 0.0).float(), value.float())


@pytest.mark.parametrize("backend", ["varlen", "flash", "fused"])
def test_neighbours_do_not_matter(backend):
    from mft_megatron.mcore.parallel.attention_spans import Spans

    kernel = kernel_of(backend, torch.bfloat16, 64)
    lengths = np.array([100, 300, 50])
    inputs = [torch.randn(450, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    spans, one = Spans.of(lengths, lengths, "cuda"), slice(100, 400)
    whole = kernel(*inputs, spans)
    others = [torch.randn_like(tensor) for tensor in inputs]
    for other, tensor in zip(others, inputs, strict=True):
        other[one] = tensor[one]
    assert kernel(*others, spans)[one].equal(whole[one])
    assert not kernel(*others, spans)[:100].equal(whole[:100])
