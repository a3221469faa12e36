"""Triton kernels of RMSNorm and layer norm, forward and backward; :mod:`.norm_on_gpu` says what they compute.

A program has whole rows in registers, so that a row is read once; of small rows, as those of a norm of heads, it has
several. In the backward pass a fixed number of programs go over all rows, and each adds up the gradients of weight and
bias of its rows, so that the sums have the same order on every GPU.
"""

from __future__ import annotations  # "tl" is None without Triton

from torch import Tensor

from .triton_package import jit, tl, triton

# more elements would be more registers than a thread has
LONGEST_ROW = 8192
ELEMENTS_OF_A_PROGRAM = 4096
BACKWARD_PROGRAMS = 256


@jit
def forward_kernel(
    hidden, weight, bias, normed, mean, scale, rows, row_stride, eps, shift,
    SIZE: tl.constexpr, CENTERED: tl.constexpr, ROWS_BLOCK: tl.constexpr, SIZE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise ``ROWS_BLOCK`` rows of SIZE elements."""
    row = tl.program_id(0) * ROWS_BLOCK + tl.arange(0, ROWS_BLOCK)
    column = tl.arange(0, SIZE_BLOCK)
    of_rows = row < rows
    of_columns = column < SIZE
    mask = of_rows[:, None] & of_columns[None, :]
    wide_row = row.to(tl.int64)[:, None]
    x = tl.load(hidden + wide_row * row_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if CENTERED:
        m = tl.sum(x, 1) / SIZE
        tl.store(mean + row, m, mask=of_rows)
        x = tl.where(mask, x - m[:, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 1) / SIZE + eps)
    tl.store(scale + row, r, mask=of_rows)
    w = tl.load(weight + column, mask=of_columns, other=0.0).to(tl.float32) + shift
    y = x * r[:, None] * w[None, :]
    if CENTERED:
        y += tl.load(bias + column, mask=of_columns, other=0.0).to(tl.float32)[None, :]
    tl.store(normed + wide_row * SIZE + column[None, :], y, mask=mask)


@jit
def backward_kernel(
    gradient, hidden, weight, mean, scale, of_hidden, of_weight, of_bias, rows, gradient_stride, row_stride, shift,
    SIZE: tl.constexpr, CENTERED: tl.constexpr, TRAINED: tl.constexpr,
    ROWS_BLOCK: tl.constexpr, SIZE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Differentiate every n-th block of rows, n the number of programs, each of which has a row of sums."""
    program = tl.program_id(0)
    column = tl.arange(0, SIZE_BLOCK)
    of_columns = column < SIZE
    w = tl.load(weight + column, mask=of_columns, other=0.0).to(tl.float32) + shift
    sum_weight = tl.zeros((SIZE_BLOCK,), dtype=tl.float32)
    sum_bias = tl.zeros((SIZE_BLOCK,), dtype=tl.float32)
    for first in range(program * ROWS_BLOCK, rows, tl.num_programs(0) * ROWS_BLOCK):
        row = first + tl.arange(0, ROWS_BLOCK)
        of_rows = row < rows
        mask = of_rows[:, None] & of_columns[None, :]
        wide_row = row.to(tl.int64)[:, None]
        x = tl.load(hidden + wide_row * row_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        g = tl.load(gradient + wide_row * gradient_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        r = tl.load(scale + row, mask=of_rows, other=0.0)[:, None]
        if CENTERED:
            x = tl.where(mask, x - tl.load(mean + row, mask=of_rows, other=0.0)[:, None], 0.0)
        x = x * r
        if TRAINED:
            sum_weight += tl.sum(g * x, 0)
            if CENTERED:
                sum_bias += tl.sum(g, 0)
        g = g * w[None, :]
        result = g - x * (tl.sum(g * x, 1) / SIZE)[:, None]
        if CENTERED:
            result -= (tl.sum(g, 1) / SIZE)[:, None]
        tl.store(of_hidden + wide_row * SIZE + column[None, :], result * r, mask=mask)
    if TRAINED:
        tl.store(of_weight + program * SIZE + column, sum_weight, mask=of_columns)
        if CENTERED:
            tl.store(of_bias + program * SIZE + column, sum_bias, mask=of_columns)


def blocks(size: int) -> dict[str, int]:
    """Sizes of a program's blocks, powers of two, for rows of ``size`` elements, and its number of warps."""
    size_block = 1 << (size - 1).bit_length()
    return {
        "ROWS_BLOCK": max(ELEMENTS_OF_A_PROGRAM // size_block, 1),
        "SIZE_BLOCK": size_block,
        "num_warps": 16 if size_block > ELEMENTS_OF_A_PROGRAM else 8,
    }


def backward_programs(rows: int, size: int) -> int:
    """Number of programs of the backward pass, each of which has sums of its own."""
    return min(BACKWARD_PROGRAMS, -(-rows // blocks(size)["ROWS_BLOCK"]))


def launch_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, normed: Tensor, mean: Tensor | None, scale: Tensor,
    eps: float, shift: float,
) -> None:  # fmt: skip
    """Write ``normed``, ``mean`` and ``scale`` of the rows of ``hidden``, [rows, H]; without a bias it is RMSNorm."""
    rows, size = hidden.shape
    sizes = blocks(size)
    forward_kernel[(triton.cdiv(rows, sizes["ROWS_BLOCK"]),)](
        hidden, weight, weight if bias is None else bias, normed, scale if mean is None else mean, scale,
        rows, hidden.stride(0), eps, shift, SIZE=size, CENTERED=bias is not None, **sizes,
    )  # fmt: skip


def launch_backward(
    gradient: Tensor, hidden: Tensor, weight: Tensor, mean: Tensor | None, scale: Tensor, of_hidden: Tensor,
    sums: Tensor | None, shift: float,
) -> None:  # fmt: skip
    """Write the gradient of ``hidden``, [rows, H], and the programs' sums of weight and, of layer norm, bias.

    ``sums`` is fp32 [1 or 2, programs, H], or ``None`` where weight and bias are not trained.
    """
    rows, size = hidden.shape
    # without use where there is no such gradient
    of_weight = scale if sums is None else sums[0]
    backward_kernel[(backward_programs(rows, size),)](
        gradient, hidden, weight, scale if mean is None else mean, scale, of_hidden,
        of_weight, of_weight if sums is None or mean is None else sums[1], rows, gradient.stride(0), hidden.stride(0),
        shift, SIZE=size, CENTERED=mean is not None, TRAINED=sums is not None, **blocks(size),
    )  # fmt: skip
