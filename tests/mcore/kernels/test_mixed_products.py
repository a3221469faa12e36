"""Products of 16-bit factors in fp32, on the CPU and with the functions of torch's releases for GPUs."""

import pytest
import torch

from mft_megatron.mcore.kernels import mixed_products
from mft_megatron.mcore.kernels.mixed_products import add_product, multiply
from tests import fake_products

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PLACES = ("cpu", *fake_products.RELEASES)


def operands(dtype, seed=1, rows=33, inner=7, columns=20):
    """Factors, the second one transposed in memory, and a sum: in fp64, of values that ``dtype`` has."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, inner, generator=generator).to(dtype)
    right = torch.randn(columns, inner, generator=generator).to(dtype).t()
    return left, right, torch.randn(rows, columns, generator=generator)


@pytest.fixture(params=PLACES)
def place(request, monkeypatch):
    """The CPU, or a GPU with one of torch's releases."""
    monkeypatch.setattr(mixed_products, "BLOCK_ELEMENTS", 40)
    monkeypatch.setattr(mixed_products, "MIN_BLOCK_ROWS", 5)
    if request.param != "cpu":
        fake_products.install(monkeypatch, request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_fp64(place, dtype):
    """Exact to fp32's rounding, except where torch can only round them to 16 bits."""
    left, right, total = operands(dtype)
    total = total.to(torch.promote_types(dtype, torch.float32))
    out = torch.full((33, 24), 7.0, dtype=total.dtype)
    product, expected = left.double() @ right.double(), total.double() + left.double() @ right.double()
    multiply(left, right, out[:, :20])
    add_product(total, left, right)
    rounded = place == "2.6" and dtype in (torch.bfloat16, torch.float16)
    tolerance = torch.finfo(dtype if rounded else total.dtype).eps * 20
    torch.testing.assert_close(out[:, :20].double(), product, rtol=0, atol=tolerance)
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=tolerance)
    assert (out[:, 20:] == 7).all()
    if rounded:
        assert torch.equal(out[:, :20], (left @ right).float())


def test_a_sum_in_16_bits_is_rounded_once(place):
    left, right, total = operands(torch.bfloat16)
    total = total.bfloat16()
    expected = (total.double() + left.double() @ right.double()).bfloat16()
    add_product(total, left, right)
    assert (total != expected).double().mean() < 0.02


def test_no_tokens(place):
    left, right, total = operands(torch.bfloat16, inner=0)
    before = total.clone()
    add_product(total, left, right)
    assert torch.equal(total, before)


def test_one_operation_since_torch_2_10(monkeypatch):
    calls = {}
    for release in fake_products.RELEASES:
        with monkeypatch.context() as patch:
            patch.setattr(mixed_products, "BLOCK_ELEMENTS", 400)
            patch.setattr(mixed_products, "MIN_BLOCK_ROWS", 20)
            products = fake_products.install(patch, release)
            left, right, total = operands(torch.bfloat16)
            mixed_products.adds_in_fp32(total.device), mixed_products.writes_fp32(total.device)
            products.calls.clear()
            add_product(total, left, right)
            calls[release] = products.calls
    assert calls == {"2.6": [], "2.8": [("mm", (20, 20)), ("mm", (13, 20))], "2.10": [("addmm", (33, 20))]}


@pytest.mark.parametrize(("release", "words"), [("2.6", "rounded"), ("2.8", "second"), ("2.10", "fp32")])
def test_what_a_release_can_do_is_in_words(monkeypatch, release, words):
    fake_products.install(monkeypatch, release)
    assert words in mixed_products.describe()


def test_what_comes_out_wrong_is_not_taken(monkeypatch):
    """A kernel that leaves out the summand, or writes nothing, costs time and no digits."""
    fake_products.install(monkeypatch, "2.10")
    multiplied = torch.mm
    monkeypatch.setattr(torch, "addmm", lambda total, left, right, **options: multiplied(left, right, **options))
    monkeypatch.setattr(torch, "mm", lambda left, right, *, out=None, **options: out)
    assert not mixed_products.adds_in_fp32(torch.device("cpu"))
    assert not mixed_products.writes_fp32(torch.device("cpu"))


def test_an_error_that_is_not_about_dtypes_is_raised(monkeypatch):
    """A GPU that is out of order does not look like an old torch."""

    def failing(*operands, **options):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED")

    fake_products.install(monkeypatch, "2.10")
    for name, tried in (("mm", mixed_products.writes_fp32), ("addmm", mixed_products.adds_in_fp32)):
        monkeypatch.setattr(torch, name, failing)
        with pytest.raises(RuntimeError, match="NOT_INITIALIZED"):
            tried(torch.device("cpu"))
