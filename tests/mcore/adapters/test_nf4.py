"""NF4 and double quantisation, compared with plain arithmetic and with bitsandbytes."""

import math

import numpy as np
import pytest
import torch

from mft_megatron.mcore.adapters import nf4
from mft_megatron.mcore.platform import optional_packages
from tests.mcore.adapters.magnitudes import expand_all

SHAPES = [
    *((64, 64), (128, 320), (300, 192), (7, 64), (96, 80), (64 * 256 * 2 + 64 * 5 + 14,)),
    # for an odd element count the library compiles a kernel first
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((33, 65), (3,), (1,), (64 * 256 + 1,))),
]
REFERENCE = nf4.Reference()


def weight_of(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    content = torch.randn(shape, generator=generator) * torch.rand(shape[0], generator=generator).view(
        -1, *[1] * len(shape[1:])
    )
    return (0.05 * content).to(dtype)


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("bitsandbytes.functional")


def _quantize(library, weight):
    return library.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_bitsandbytes(library, shape, dtype):
    """The library's CPU kernel of the second level first rounds its input to 16 bits, so some codes differ by 1."""
    weight = weight_of(shape, dtype)
    codes, magnitudes = REFERENCE.quantize(weight)
    ours = nf4.compress(magnitudes)
    packed, theirs = _quantize(library, weight)
    assert codes.equal(packed.view(-1))
    assert ours.offset.equal(theirs.offset)
    assert ours.largest.equal(theirs.state2.absmax)
    difference = (ours.codes.int() - theirs.absmax.int()).abs()
    if len(magnitudes) > 1:  # a single magnitude minus the mean is 0, which that kernel encodes as -1
        assert difference.max() <= 1
        assert (difference > 0).sum() <= 1 + len(difference) // 200
    same = nf4.Magnitudes(theirs.absmax, theirs.state2.absmax, theirs.offset)
    # its CPU kernel is wrong for rows that are no multiple of the block size; for one long row it is right
    theirs.shape = torch.Size([weight.numel()])
    again = library.dequantize_4bit(packed, theirs).view(shape)
    assert REFERENCE.dequantize(codes, expand_all(same), shape, dtype).equal(again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_the_library(library, monkeypatch, dtype):
    """The operators that CUDA uses, here with the library's CPU code."""
    kernels, weight = nf4.Bitsandbytes(), weight_of((48, 192), dtype)
    codes, magnitudes = kernels.quantize(weight)
    ours = REFERENCE.quantize(weight)
    assert codes.equal(ours[0])
    assert magnitudes.equal(ours[1])
    again = kernels.dequantize(codes, magnitudes, weight.shape, dtype)
    assert again.equal(REFERENCE.dequantize(codes, magnitudes, weight.shape, dtype))
    assert kernels.name.startswith("bitsandbytes 0.")


def test_between_two_values(library):
    """Midpoints and their neighbours, where division and multiplication by the reciprocal round differently."""
    largest = torch.rand(500, 1, generator=torch.Generator().manual_seed(2)) + 0.1
    values = torch.tensor(nf4.VALUES)
    middle = largest * ((values[:-1] + values[1:]) / 2)
    above, below = (middle.nextafter(torch.full((1,), side * 2.0)) for side in (1, -1))
    weight = torch.cat([largest, middle, above, below, torch.zeros(500, 18)], 1)
    assert REFERENCE.quantize(weight)[0].equal(_quantize(library, weight)[0].view(-1))


def test_every_element_has_the_nearest_value():
    weight = weight_of((40, 64), torch.float32)
    codes, magnitudes = REFERENCE.quantize(weight)
    again = REFERENCE.dequantize(codes, magnitudes, weight.shape, torch.float32)
    for row, result in zip(weight.double().numpy(), again.double().numpy(), strict=True):
        levels = np.abs(row).max() * np.array(nf4.VALUES)
        nearest = levels[np.abs(row[:, None] - levels).argmin(1)]
        np.testing.assert_allclose(result, nearest, rtol=1e-6)


def test_values_are_quantiles_of_a_normal_distribution():
    """Eight quantiles above 0 and seven below, evenly spaced in probability, over the largest (appendix E)."""
    ends = 0.9677083
    above = [_quantile(ends + (0.5 - ends) * i / 8) for i in range(8)]
    below = [-_quantile(ends + (0.5 - ends) * i / 7) for i in range(7)]
    expected = np.sort([*above, 0.0, *below]) / max(above)
    np.testing.assert_allclose(nf4.VALUES, expected, atol=2e-7)


def _quantile(probability):
    low, high = -10.0, 10.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * (1 + math.erf(middle / math.sqrt(2))) < probability else (low, middle)
    return low


def test_second_level():
    """Magnitudes are reproduced to the resolution of 8 bits of a group's range, for each group separately."""
    magnitudes = torch.rand(700, generator=torch.Generator().manual_seed(1)) + 0.5
    magnitudes[256:512] *= 0.01
    rounded = nf4.compress(magnitudes)
    assert (rounded.codes.shape, rounded.largest.shape, rounded.codes.dtype) == ((700,), (3,), torch.uint8)
    assert rounded.offset == magnitudes.mean()
    for group in (slice(0, 256), slice(256, 512), slice(512, 700)):
        centred = magnitudes[group] - magnitudes.mean()
        assert rounded.largest[group.start // 256] == centred.abs().max()
        error = expand_all(rounded)[group] - magnitudes[group]
        # neighbours in the upper tenth of the map are 0.9 / 64 difference
        assert error.abs().max() <= 0.51 * 0.9 / 64 * centred.abs().max()


def test_zeros_stay_zeros():
    codes, magnitudes = REFERENCE.quantize(torch.zeros(3, 128))
    assert magnitudes.eq(0).all()
    rounded = expand_all(nf4.compress(magnitudes))
    assert REFERENCE.dequantize(codes, rounded, (3, 128), torch.float32).eq(0).all()


def test_kernels_are_chosen_by_device(monkeypatch):
    nf4.kernels.cache_clear()
    monkeypatch.setattr(nf4.devices, "HAS_CUDA", False)
    assert nf4.kernels().name == "torch"
    nf4.kernels.cache_clear()
    monkeypatch.setattr(nf4.devices, "HAS_CUDA", True)
    monkeypatch.setattr(
        optional_packages, "missing", lambda package: f"needs {package.name}, which is not installed: …"
    )
    with pytest.raises(nf4.InputError, match="--peft-type qlora needs bitsandbytes, which is not installed"):
        nf4.kernels()
    nf4.kernels.cache_clear()
