"""NF4 with double quantisation (QLoRA, Dettmers et al. 2023, arXiv 2305.14314): a reference, and a library's kernels.

::

    64 weights ─► their largest magnitude, and 4 bits each: the nearest of 16 quantiles of a normal distribution
    256 such magnitudes, minus the mean of all ─► the largest of these, and 8 bits each: the nearest of a "dynamic" map

    bytes per weight: 1/2 + 1/64 + 4/(64·256) = 0.516

Results equal ``bitsandbytes.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True,
quant_type="nf4")``. The first level is nearly all of the work; on CUDA the library computes it. The second is 1/64 of
it and always computed in torch.
"""

import dataclasses
import functools

import torch
from torch import Tensor

from mft_megatron.errors import InputError
from mft_megatron.mcore.platform import devices, optional_packages

BLOCK = 64
GROUP = 256
# the table of the paper's appendix E, to the float32 that all kernels have
VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_LEAST = 1e-38  # smaller than the magnitude of any block that is not all 0


class Reference:
    """First level in torch, on any device."""

    name = "torch"

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise a weight of n elements in blocks of 64, in row-major order.

        Args:
            weight: of any shape and of a floating-point dtype.

        Returns:
            codes, uint8 [ceil(n / 2)], two per byte, the first in the upper half; magnitudes of the blocks, fp32
            [ceil(n / 64)].
        """
        scaled, magnitudes = _scaled(weight, BLOCK)
        scaled = torch.nn.functional.pad(scaled, (0, scaled.numel() % 2))
        codes = torch.bucketize(scaled, _bounds(_values(weight.device)), out_int32=True).to(torch.uint8)
        return (codes[::2] << 4) | codes[1::2], magnitudes

    def dequantize(self, codes: Tensor, magnitudes: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Compute the weight of :meth:`quantize`'s results, each element rounded once, from fp32 to ``dtype``.

        Args:
            codes: uint8 [ceil(n / 2)].
            magnitudes: fp32 [ceil(n / 64)].
            shape: shape of the weight, n elements.
            dtype: dtype of the result.
        """
        n, values = torch.Size(shape).numel(), _values(codes.device)
        pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], 1)  # by byte
        content = pairs.index_select(0, codes.int()).view(-1)[:n]
        return _times_blocks(content, magnitudes, BLOCK).to(dtype).view(shape)


class Bitsandbytes:
    """First level by the kernels of bitsandbytes."""

    name = "bitsandbytes"

    def __init__(self) -> None:
        """Import the library.

        Raises:
            InputError: it is not installed.
        """
        why = optional_packages.missing(optional_packages.BITSANDBYTES)
        if why is not None:
            raise InputError(f"--peft-type qlora {why}")
        import bitsandbytes

        self.name = f"bitsandbytes {bitsandbytes.__version__}"

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise as :meth:`Reference.quantize` does, a weight of fp32, bf16 or fp16."""
        codes, magnitudes = torch.ops.bitsandbytes.quantize_4bit(weight.contiguous(), BLOCK, "nf4", torch.uint8)
        return codes.view(-1), magnitudes

    def dequantize(self, codes: Tensor, magnitudes: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Compute the weight as :meth:`Reference.dequantize` does."""
        return torch.ops.bitsandbytes.dequantize_4bit(codes.view(-1, 1), magnitudes, BLOCK, "nf4", list(shape), dtype)


class Simulated:
    """First level of a dry run: results of the shapes that bitsandbytes gives, which allocates nothing else."""

    name = "bitsandbytes, simulated"

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Allocate the results of :meth:`Reference.quantize`."""
        n = weight.numel()
        return weight.new_empty(-(-n // 2), dtype=torch.uint8), weight.new_empty(-(-n // BLOCK), dtype=torch.float32)

    def dequantize(self, codes: Tensor, magnitudes: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate the result of :meth:`Reference.dequantize`."""
        return codes.new_empty(shape, dtype=dtype)


Kernels = Reference | Bitsandbytes | Simulated


@functools.cache
def kernels() -> Kernels:
    """Choose the kernels of the first level: the library's on CUDA, shapes alone in a dry run, the reference elsewhere.

    Raises:
        InputError: there is a CUDA device, and the library is not installed.
    """
    if devices.device().type == "meta":
        return Simulated()
    return Bitsandbytes() if devices.HAS_CUDA else Reference()


def describe() -> str:
    """Describe for the log what is kept in 4 bits and which kernels compute it."""
    return f"frozen matrices: NF4, by {kernels().name}"


@dataclasses.dataclass(frozen=True)
class Magnitudes:
    """Quantised magnitudes of the blocks of a matrix: the second level.

    Attributes:
        codes: uint8 [blocks].
        largest: fp32 [ceil(blocks / 256)], largest distance from ``offset`` in each group.
        offset: fp32 [], mean of all magnitudes.
    """

    codes: Tensor
    largest: Tensor
    offset: Tensor


def compress(magnitudes: Tensor) -> Magnitudes:
    """Quantise the magnitudes of a whole matrix, fp32 [blocks]."""
    offset = magnitudes.mean()
    scaled, largest = _scaled(magnitudes - offset, GROUP)
    codes = torch.bucketize(scaled, _bounds(_dynamic_map(magnitudes.device)), out_int32=True)
    return Magnitudes(codes.to(torch.uint8), largest, offset)


def expand(codes: Tensor, largest: Tensor, offset: Tensor) -> Tensor:
    """Compute magnitudes from their codes.

    Args:
        codes: uint8, of any shape.
        largest: fp32 of the same shape, each element its group's.
        offset: fp32 of the same shape, or [].

    Returns:
        fp32 of the same shape.
    """
    return _dynamic_map(codes.device).index_select(0, codes.view(-1).int()).view(codes.shape) * largest + offset


def _scaled(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Values divided by the largest magnitude of their block, fp32 [n], and these magnitudes, fp32 [ceil(n / size)]."""
    flat = values.reshape(-1).float()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)
    largest = padded.abs().amax(1)
    # the library's kernels multiply by the reciprocal, which rounds differently from a division
    scaled = (padded * (1.0 / largest.clamp(min=_LEAST))[:, None]).clamp_(-1, 1)
    return scaled.view(-1)[: flat.numel()], largest


def _times_blocks(content: Tensor, magnitudes: Tensor, size: int) -> Tensor:
    padded = torch.nn.functional.pad(content, (0, -content.numel() % size)).view(-1, size)
    return (padded * magnitudes[:, None]).view(-1)[: content.numel()]


def _bounds(values: Tensor) -> Tensor:
    """Midpoints between the sorted ``values``, fp32 [n] -> [n - 1]; a midpoint itself is rounded down."""
    return (values[:-1] + values[1:]) / 2


@functools.cache
def _values(device: torch.device) -> Tensor:
    return torch.tensor(VALUES, dtype=torch.float32, device=device)


@functools.cache
def _dynamic_map(device: torch.device) -> Tensor:
    """256 values in [-1, 1], fp32 (Dettmers 2015, arXiv 1511.04561): twice as many per power of ten, evenly spaced."""
    positive = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float32)
        positive += (10.0 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    negative = [-value for value in positive if value not in (0.0, 1.0)]
    return torch.tensor(sorted(positive + negative), dtype=torch.float32, device=device)
