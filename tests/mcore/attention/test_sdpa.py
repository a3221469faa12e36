"""The kernel that runs everywhere, against a dense mask in fp64: fewer queries than keys, windows, grouped heads."""

import numpy as np
import pytest
import torch

from mft_megatron.mcore.attention import sdpa
from mft_megatron.mcore.parallel.attention_spans import pieces
from mft_megatron.mcore.parallel.context_parallel import own_ranges
from tests.attention_reference import dense_attention

LENGTHS = (13, 1, 22, 8, 20)
TOTAL = sum(LENGTHS)
CU = np.array([0, *LENGTHS], dtype=np.int32).cumsum()


def make(heads=4, groups=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((TOTAL, heads, 8), (TOTAL, groups, 8), (TOTAL, groups, 8))
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def of_rank(tensors, rank, size, window, scale):
    """Output of a rank's queries, and their places."""
    ranges = own_ranges(TOTAL, rank, size)
    own = pieces(CU, ranges)
    places, keys = (torch.from_numpy(array) for array in (np.concatenate([np.arange(*r) for r in ranges]), own.keys()))
    query, key, value = tensors
    return sdpa.local(query[places], key[keys], value[keys], own.spans(), scale, window), places


@pytest.mark.parametrize("block", [5, 256])
@pytest.mark.parametrize("window", [None, 0, 3, 12, 30])
@pytest.mark.parametrize(("size", "groups", "scale"), [(1, 2, None), (2, 4, 0.3), (4, 1, None)])
def test_equals_a_dense_mask(monkeypatch, block, window, size, groups, scale):
    monkeypatch.setattr(sdpa, "BLOCK", block)
    ours, theirs = make(groups=groups), make(groups=groups)
    for tensor in (*ours, *theirs):
        tensor.requires_grad_()
    upstream = torch.randn(TOTAL, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = dense_attention(*theirs, LENGTHS, scale, window)
    expected.backward(upstream)
    for rank in range(size):
        output, places = of_rank(ours, rank, size, window, scale)
        torch.testing.assert_close(output, expected[places], rtol=0, atol=1e-12)
        output.backward(upstream[places])
    for own, book in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad, book.grad, rtol=0, atol=1e-12)


def test_a_window_that_sees_everything_is_none():
    tensors = [tensor.float() for tensor in make()]
    spans = pieces(CU, own_ranges(TOTAL, 0, 1)).spans()
    assert sdpa.local(*tensors, spans, window=21).equal(sdpa.local(*tensors, spans))
    assert not sdpa.local(*tensors, spans, window=20).equal(sdpa.local(*tensors, spans))


def test_heads_of_a_group_share_keys_and_values():
    """Grouped heads give what repeated keys and values give."""
    query, key, value = make()
    spans = pieces(CU, own_ranges(TOTAL, 0, 1)).spans()
    repeated = sdpa.local(query, *(x.repeat_interleave(2, dim=1) for x in (key, value)), spans)
    torch.testing.assert_close(sdpa.local(query, key, value, spans), repeated, rtol=0, atol=1e-14)


@pytest.mark.parametrize("window", [None, 3])
def test_dropped_weights_are_made_up_for_by_the_others(window):
    """Weights are dropped, not outputs: of equal values the mean output stays, and one query's differ from draw to
    draw."""
    query, key, value = make()
    spans = pieces(CU, own_ranges(TOTAL, 0, 1)).spans()
    torch.manual_seed(0)
    ones = torch.ones_like(value)
    drawn = torch.stack([sdpa.local(query, key, ones, spans, window=window, dropout=0.5) for _ in range(400)])
    assert drawn.mean().item() == pytest.approx(1.0, abs=0.02)
    assert drawn.std(0).min().item() > 0.1
    # heads of a token are dropped on their own, all channels of a head at once
    assert drawn[..., 0].equal(drawn[..., 7])
    assert not drawn[:, :, 0].equal(drawn[:, :, 1])


def test_results_keep_shape_and_dtype():
    spans = pieces(CU, own_ranges(TOTAL, 0, 1)).spans()
    for dtype in (torch.float32, torch.bfloat16):
        output = sdpa.local(*(tensor.to(dtype) for tensor in make()), spans, window=4)
        assert (output.dtype, output.shape) == (dtype, (TOTAL, 4, 8))
