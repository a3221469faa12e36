"""NF4 with double quantisation (QLoRA, Dettmers et al. 2023, arXiv 2305.14314): a reference, and a library's kernels.

::

    64 weights ─► their largest magnitude, and 4 bits each: the nearest of 16 quantiles of a normal distribution
    256 such magnitudes, less the mean of all ─► the largest of these, and 8 bits each: the nearest of a "dynamic" map

    bytes a weight: 1/2 + 1/64 + 4/(64·256) = 0.516

The numbers are those of ``bitsandbytes.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True,
quant_type="nf4")``. The first level is the work, on CUDA of the library; the second is 1/64 of it, always in torch.
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
_LEAST = 1e-38  # below the magnitude of any block but of one that is all 0


class Reference:
    """The first level in torch, on any device."""

    name = "torch"

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and magnitudes of a weight's blocks, which follow one another through all rows.

        Args:
            weight: of any shape and of a floating-point dtype.

        Returns:
            codes, uint8 [ceil(n / 2)], the first of two in the upper half; magnitudes, fp32 [ceil(n / 64)].
        """
        scaled, magnitudes = _scaled(weight, BLOCK)
        scaled = torch.nn.functional.pad(scaled, (0, scaled.numel() % 2))
        codes = torch.bucketize(scaled, _bounds(_values(weight.device)), out_int32=True).to(torch.uint8)
        return (codes[::2] << 4) | codes[1::2], magnitudes

    def dequantize(self, codes: Tensor, magnitudes: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The weight again, each element rounded once, from fp32 to ``dtype``."""
        n, values = torch.Size(shape).numel(), _values(codes.device)
        pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], 1)  # by byte
        content = pairs.index_select(0, codes.int()).view(-1)[:n]
        return _times_blocks(content, magnitudes, BLOCK).to(dtype).view(shape)


class Bitsandbytes:
    """The same by the kernels of bitsandbytes."""

    name = "bitsandbytes"

    def __init__(self):
        """
        Raises:
            InputError: the library is not installed.
        """
        why = optional_packages.missing(optional_packages.BITSANDBYTES)
        if why is not None:
            raise InputError(f"--peft-type qlora {why}")
        import bitsandbytes

        self.name = f"bitsandbytes {bitsandbytes.__version__}"

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`Reference.quantize`, of fp32, bf16 or fp16."""
        codes, magnitudes = torch.ops.bitsandbytes.quantize_4bit(weight.contiguous(), BLOCK, "nf4", torch.uint8)
        return codes.view(-1), magnitudes

    def dequantize(self, codes: Tensor, magnitudes: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As :meth:`Reference.dequantize`."""
        return torch.ops.bitsandbytes.dequantize_4bit(codes.view(-1, 1), magnitudes, BLOCK, "nf4", list(shape), dtype)


Kernels = Reference | Bitsandbytes


@functools.cache
def kernels() -> Kernels:
    """What this machine computes the first level with: the library on CUDA, the reference elsewhere.

    Raises:
        InputError: there is CUDA, and the library is not installed.
    """
    return Bitsandbytes() if devices.HAS_CUDA else Reference()


def describe() -> str:
    """What is in 4 bits, and what computes that, for the log."""
    return f"frozen matrices: NF4, by {kernels().name}"


@dataclasses.dataclass(frozen=True)
class Magnitudes:
    """Magnitudes of the blocks of a matrix at the second level.

    ``codes``: uint8 [blocks]. ``largest``: fp32 [ceil(blocks / 256)], of each group. ``offset``: fp32 [], their mean.
    """

    codes: Tensor
    largest: Tensor
    offset: Tensor


def compress(magnitudes: Tensor) -> Magnitudes:
    """The second level of a whole matrix: fp32 [blocks]."""
    offset = magnitudes.mean()
    scaled, largest = _scaled(magnitudes - offset, GROUP)
    codes = torch.bucketize(scaled, _bounds(_dynamic_map(magnitudes.device)), out_int32=True)
    return Magnitudes(codes.to(torch.uint8), largest, offset)


def expand(codes: Tensor, largest: Tensor, offset: Tensor) -> Tensor:
    """Magnitudes again, fp32, each out of its code and of what its group has; all of one shape."""
    return _dynamic_map(codes.device).index_select(0, codes.view(-1).int()).view(codes.shape) * largest + offset


def expand_all(magnitudes: Magnitudes) -> Tensor:
    """Of a whole matrix: fp32 [blocks]."""
    codes = magnitudes.codes
    return expand(codes, magnitudes.largest.repeat_interleave(GROUP)[: codes.numel()], magnitudes.offset)


def _scaled(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Values, in order, over the largest magnitude of their block, and these; fp32 [n], fp32 [ceil(n / size)]."""
    flat = values.reshape(-1).float()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)
    largest = padded.abs().amax(1)
    # kernels multiply by the reciprocal, which is not quite a division
    scaled = (padded * (1.0 / largest.clamp(min=_LEAST))[:, None]).clamp_(-1, 1)
    return scaled.view(-1)[: flat.numel()], largest


def _times_blocks(content: Tensor, magnitudes: Tensor, size: int) -> Tensor:
    padded = torch.nn.functional.pad(content, (0, -content.numel() % size)).view(-1, size)
    return (padded * magnitudes[:, None]).view(-1)[: content.numel()]


def _bounds(values: Tensor) -> Tensor:
    """Between which a number belongs to each of the sorted ``values``; in the middle of two it belongs to the lower."""
    return (values[:-1] + values[1:]) / 2


@functools.cache
def _values(device: torch.device) -> Tensor:
    return torch.tensor(VALUES, dtype=torch.float32, device=device)


@functools.cache
def _dynamic_map(device: torch.device) -> Tensor:
    """256 numbers of [-1, 1] (Dettmers 2015, arXiv 1511.04561): in each larger power of ten twice as many, evenly."""
    positive = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float32)
        positive += (10.0 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    negative = [-value for value in positive if value not in (0.0, 1.0)]
    return torch.tensor(sorted(positive + negative), dtype=torch.float32, device=device)
