"""Main weights kept as remainders of bf16 weights are read again bit for bit."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mft_megatron.mcore.optim.remainders import join_remainders, split_remainders

FLOATS = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50)


def bits(values):
    return values.contiguous().view(torch.int32).tolist()


@given(FLOATS)
def test_any_float_comes_back(values):
    main = torch.tensor(values, dtype=torch.float32)
    assert bits(join_remainders(*split_remainders(main))) == bits(main)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50))
def test_as_the_kernel_does_it_bit_by_bit(patterns):
    """``adam.cu`` of Transformer Engine 2.11, for one element: int16 halves of an fp32, wrapped as C++ does."""

    def int16(value):
        return (value + 2**15) % 2**16 - 2**15

    weights, remainders = split_remainders(torch.tensor(patterns, dtype=torch.int32).view(torch.float32))
    for pattern, weight, remainder in zip(
        patterns, weights.view(torch.int16).tolist(), remainders.tolist(), strict=True
    ):
        lower, upper = int16(pattern), pattern >> 16
        assert (weight, remainder) == (int16(upper + (lower < 0)), lower)


def test_the_weight_is_the_rounded_main_weight():
    """It is torch's rounding but for halves, which torch gives to the even neighbour and the kernel to the larger."""
    main = torch.tensor([-0.168, 0.168, 1.0, -1e-40, 1.0 + 2**-8, -1.0 - 2**-8], dtype=torch.float32)
    weights, _ = split_remainders(main)
    assert weights[:4].equal(main[:4].bfloat16())
    assert weights[4:].tolist() == [1.0 + 2**-7, -1.0 - 2**-7]
    assert main[4:].bfloat16().tolist() == [1.0, -1.0]
