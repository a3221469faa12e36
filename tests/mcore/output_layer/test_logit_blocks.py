"""Sizes and layouts of blocks of logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mft_megatron.mcore.output_layer.logit_blocks import CPU, GPU


def weight_of(rows, dtype=torch.bfloat16):
    return torch.empty(rows, 8, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("rows", "total", "with_gradient", "tokens"),
    [
        (151936, 8192, True, 2048),  # 1.9 GB: fewer tokens would wait for memory
        (151936, 8192, False, 1171),  # seven blocks of 1 GiB at most
        (151936, 2100, True, 1050),
        (18992, 16384, True, 8192),  # TP8
        (18992, 4096, True, 9422),  # one block
        (4004, 4096, True, 44694),
    ],
)
def test_on_a_gpu(rows, total, with_gradient, tokens):
    assert GPU.tokens(total, weight_of(rows), with_gradient) == tokens


def test_on_the_cpu():
    """2**24 logits in fp32, whatever follows."""
    assert CPU.tokens(5000, weight_of(32000, torch.float32), True) == 2**24 // 32000
    assert CPU.tokens(5000, weight_of(152064, torch.float32), False) == 256


@given(st.integers(1, 200_000), st.integers(1, 20_000), st.booleans(), st.sampled_from([torch.bfloat16, torch.float32]))
def test_blocks_of_a_gpu_are_even_and_bounded(rows, total, with_gradient, dtype):
    tokens = GPU.tokens(total, weight_of(rows, dtype), with_gradient)
    element = 6 if dtype == torch.bfloat16 else 4
    least = 2048 if with_gradient else 256
    assert min(tokens, total) * rows * element <= max(2**30, least * rows * element)
    blocks = -(-total // tokens)
    assert total > tokens * (blocks - 1)
    if blocks > 1:
        assert total - tokens * (blocks - 1) > tokens - blocks  # the last block is hardly smaller


@pytest.mark.parametrize(
    ("real", "rows", "columns"), [(32017, 32128, 32024), (11905, 11905, 11905), (3, 64, 8), (0, 64, 0), (64, 64, 64)]
)
def test_rows_are_aligned(real, rows, columns):
    weight = weight_of(rows)
    assert GPU.columns_of(real, weight) == columns
    assert CPU.columns_of(real, weight) == real
    for dtype in (torch.bfloat16, torch.float32):
        block = GPU.allocate(5, columns, weight, dtype)
        assert block.shape == (5, columns)
        assert not columns or (block.stride(0) * dtype.itemsize % 128, block.stride(1)) == (0, 1)
        assert CPU.allocate(5, real, weight, dtype).is_contiguous()
