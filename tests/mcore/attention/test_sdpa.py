"""The kernel for any device against a dense mask in fp64: fewer queries than keys, windows, grouped heads."""

import numpy as np
import pytest
import torch

from mft_megatron.mcore.attention import sdpa
from mft_megatron.mcore.parallel.attention_spans import slice_segments
from mft_megatron.mcore.parallel.context_parallel import rank_ranges
from tests.attention_reference import dense_attention

LENGTHS = (13, 1, 22, 8, 20)
TOTAL = sum(LENGTHS)
CU = np.array([0, *LENGTHS], dtype=np.int32).cumsum()


def make(heads=4, groups=2, seed=0):
    """Query [T, heads, 8], key and value [T, groups, 8], fp64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((TOTAL, heads, 8), (TOTAL, groups, 8), (TOTAL, groups, 8))
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def of_rank(tensors, rank, size, window, scale):
    """Attention output of a context-parallel rank's queries, and their indices in the stream."""
    ranges = rank_ranges(TOTAL, rank, size)
    slices = slice_segments(CU, ranges)
    queries = torch.from_numpy(np.concatenate([np.arange(*limits) for limits in ranges]))
    keys = torch.from_numpy(slices.key_indices())
    query, key, value = tensors
    return sdpa.local(query[queries], key[keys], value[keys], slices.spans(), scale, window), queries


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
        output, indices = of_rank(ours, rank, size, window, scale)
        torch.testing.assert_close(output, expected[indices], rtol=0, atol=1e-12)
        output.backward(upstream[indices])
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.grad, their.grad, rtol=0, atol=1e-12)


def test_a_window_that_sees_everything_is_none():
    tensors = [tensor.float() for tensor in make()]
    spans = slice_segments(CU, rank_ranges(TOTAL, 0, 1)).spans()
    assert sdpa.local(*tensors, spans, window=21).equal(sdpa.local(*tensors, spans))
    assert not sdpa.local(*tensors, spans, window=20).equal(sdpa.local(*tensors, spans))


def test_heads_of_a_group_share_keys_and_values():
    """Grouped heads and repeated keys and values have the same output."""
    query, key, value = make()
    spans = slice_segments(CU, rank_ranges(TOTAL, 0, 1)).spans()
    repeated = sdpa.local(query, *(x.repeat_interleave(2, dim=1) for x in (key, value)), spans)
    torch.testing.assert_close(sdpa.local(query, key, value, spans), repeated, rtol=0, atol=1e-14)


@pytest.mark.parametrize("window", [None, 3])
def test_dropout_keeps_the_mean(window):
    """Weights are dropped, not outputs: for equal values the mean output is the same, and a query's outputs vary."""
    query, key, value = make()
    spans = slice_segments(CU, rank_ranges(TOTAL, 0, 1)).spans()
    torch.manual_seed(0)
    ones = torch.ones_like(value)
    outputs = torch.stack([sdpa.local(query, key, ones, spans, window=window, dropout=0.5) for _ in range(400)])
    assert outputs.mean().item() == pytest.approx(1.0, abs=0.02)
    assert outputs.std(0).min().item() > 0.1
    # each head drops other weights, all channels of a head the same
    assert outputs[..., 0].equal(outputs[..., 7])
    assert not outputs[:, :, 0].equal(outputs[:, :, 1])


def test_results_keep_shape_and_dtype():
    spans = slice_segments(CU, rank_ranges(TOTAL, 0, 1)).spans()
    for dtype in (torch.float32, torch.bfloat16):
        output = sdpa.local(*(tensor.to(dtype) for tensor in make()), spans, window=4)
        assert (output.dtype, output.shape) == (dtype, (TOTAL, 4, 8))
