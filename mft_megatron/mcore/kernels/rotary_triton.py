"""The Triton kernel of the rotary embedding; :mod:`.rotary` says what it computes."""

from __future__ import annotations  # "tl" is None without Triton

from torch import Tensor

from .triton_package import jit, tl, triton

# pairs of elements that one program rotates
PAIRS_OF_A_PROGRAM = 1024


@jit
def rotate_kernel(
    value, result, cos, sin, heads, token_stride, head_stride,
    PAIRS: tl.constexpr, SIZE: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, PAIRS_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate ``HEADS_BLOCK`` heads of one token: [heads, SIZE], of which 2 · PAIRS elements are rotated."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    source = value + token * token_stride + head[:, None] * head_stride
    target = result + (token * heads + head[:, None]) * SIZE
    of_heads = head[:, None] < heads

    pair = tl.arange(0, PAIRS_BLOCK)
    c = tl.load(cos + token * PAIRS + pair, mask=pair < PAIRS, other=0.0)[None, :]
    s = tl.load(sin + token * PAIRS + pair, mask=pair < PAIRS, other=0.0)[None, :]
    if BACK:
        s = -s
    if INTERLEAVED:
        first = 2 * pair[None, :]
        second = first + 1
    else:
        first = pair[None, :]
        second = first + PAIRS
    mask = of_heads & (pair[None, :] < PAIRS)
    a = tl.load(source + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + second, mask=mask, other=0.0).to(tl.float32)
    tl.store(target + first, a * c - b * s, mask=mask)
    tl.store(target + second, b * c + a * s, mask=mask)
    if REST_BLOCK > 0:
        rest = 2 * PAIRS + tl.arange(0, REST_BLOCK)[None, :]
        mask = of_heads & (rest < SIZE)
        tl.store(target + rest, tl.load(source + rest, mask=mask), mask=mask)


def blocks(heads: int, pairs: int, size: int) -> dict[str, int]:
    """Sizes of the kernel's blocks, powers of two, for so many heads, rotated pairs and elements of a head."""
    pairs_block, rest = triton.next_power_of_2(pairs), size - 2 * pairs
    return {
        "HEADS_BLOCK": min(triton.next_power_of_2(heads), max(PAIRS_OF_A_PROGRAM // pairs_block, 1)),
        "PAIRS_BLOCK": pairs_block,
        "REST_BLOCK": triton.next_power_of_2(rest) if rest else 0,
    }


def launch(value: Tensor, result: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> None:
    """Write the rotated ``value``, [T, heads, d], into the contiguous ``result``; cosines and sines are [T, R / 2]."""
    tokens, heads, size = value.shape
    pairs = cos.shape[-1]
    sizes = blocks(heads, pairs, size)
    grid = (tokens, triton.cdiv(heads, sizes["HEADS_BLOCK"]))
    rotate_kernel[grid](
        value, result, cos, sin, heads, value.stride(0), value.stride(1),
        PAIRS=pairs, SIZE=size, INTERLEAVED=interleaved, BACK=back, **sizes,
    )  # fmt: skip
