"""Products of 16-bit matrices into fp32 on CUDA against fp64 on the CPU."""

import pytest
import torch
from packaging.version import Version

from mft_megatron.mcore.kernels.mixed_products import add_product, adds_in_fp32, multiply, writes_fp32


def operands(dtype, rows, inner=515, columns=264):
    """Factors, the first one transposed in memory, and a sum, on the CPU."""
    generator = torch.Generator().manual_seed(rows)
    left = torch.randn(inner, rows, generator=generator).to(dtype).t()
    right = torch.randn(inner, columns, generator=generator).to(dtype)
    return left, right, torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize("rows", [512, 997])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_are_not_rounded(dtype, rows):
    left, right, total = operands(dtype, rows)
    product = left.double() @ right.double()
    expected = total.double() + product
    left, right, total = left.cuda(), right.cuda(), total.cuda()
    out = torch.empty(rows, 320, device="cuda")[:, :264]
    multiply(left, right, out)
    add_product(total, left, right)
    tolerance = 1e-4 if writes_fp32(total.device) else 0.3
    torch.testing.assert_close(out.cpu().double(), product, rtol=0, atol=tolerance)
    torch.testing.assert_close(total.cpu().double(), expected, rtol=0, atol=tolerance)


def test_releases_that_can():
    """Products into fp32 are documented since torch 2.8, and a summand in fp32 is in its source since 2.10."""
    device, release = torch.device("cuda", 0), Version(torch.__version__).release
    assert writes_fp32(device) == (release >= (2, 8))
    assert adds_in_fp32(device) == (release >= (2, 10))


def test_the_sum_stays_where_it_is():
    left, right, total = (tensor.cuda() for tensor in operands(torch.bfloat16, 1024))
    adds_in_fp32(total.device)
    add_product(total, left, right)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    add_product(total, left, right)
    if adds_in_fp32(total.device):
        assert torch.cuda.max_memory_allocated() == before
