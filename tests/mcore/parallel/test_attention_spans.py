"""Pairs of queries and keys: those of the segment slices of all ranks are those of causal attention in each segment."""

import itertools

import numpy as np
import pytest

from mft_megatron.mcore.parallel.attention_spans import Spans, slice_segments
from mft_megatron.mcore.parallel.context_parallel import gathered_indices, rank_ranges


def random_segments(total, seed):
    """Starts of random segments of a stream of ``total`` tokens, some of one token, then ``total``; int32."""
    rng = np.random.default_rng(seed)
    borders = rng.choice(np.arange(1, total), size=rng.integers(0, total // 2), replace=False)
    return np.array([0, *sorted(borders), total], dtype=np.int32)


def expected_pairs(cu_seqlens):
    """(query, key) of causal attention within each segment, as token indices in the stream."""
    return {
        (query, key)
        for start, end in itertools.pairwise(cu_seqlens.tolist())
        for query in range(start, end)
        for key in range(start, query + 1)
    }


def pairs_of(slices, indices):
    """(query, key) of a rank's segment slices by the rule of :class:`Spans`: the last query sees the last key.

    ``indices``: of the rank's tokens in the stream, int64.
    """
    spans, keys, pairs = slices.spans(), slices.key_indices(), []
    for index, (queries, count) in enumerate(zip(spans.lengths_q, spans.lengths_k, strict=True)):
        first_query, first_key = int(spans.cu_q[index]), int(spans.cu_k[index])
        for query in range(queries):
            for key in range(count - queries + query + 1):
                pairs.append((int(indices[first_query + query]), int(keys[first_key + key])))
    assert int(spans.cu_q[-1]) == len(indices)
    assert int(spans.cu_k[-1]) == len(keys)
    assert (spans.max_q, spans.max_k) == (max(spans.lengths_q), max(spans.lengths_k))
    return pairs


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(6))
def test_each_pair_is_computed_once_by_one_rank(size, seed):
    total = 48
    cu_seqlens = random_segments(total, seed)
    pairs, seen = [], []
    for rank in range(size):
        ranges = rank_ranges(total, rank, size)
        indices = np.concatenate([np.arange(*limits) for limits in ranges])
        pairs += pairs_of(slice_segments(cu_seqlens, ranges), indices)
        seen += indices.tolist()
    assert sorted(pairs) == sorted(expected_pairs(cu_seqlens))
    assert sorted(seen) == list(range(total))


def test_the_whole_stream_is_its_segments():
    slices = slice_segments(np.array([0, 3, 4, 10], dtype=np.int32), rank_ranges(10, 0, 1))
    spans = slices.spans()
    assert spans.lengths_q == spans.lengths_k == [3, 1, 6]
    assert slices.key_indices().tolist() == list(range(10))


def test_a_segment_over_several_blocks():
    """Blocks of 2 tokens; the segment 1 … 7 is in all four."""
    cu_seqlens = np.array([0, 1, 8], dtype=np.int32)
    first = slice_segments(cu_seqlens, rank_ranges(8, 0, 2))
    assert first.spans().lengths_q == [1, 1, 2]
    assert first.spans().lengths_k == [1, 1, 7]
    assert first.key_indices().tolist() == [0, 1, 1, 2, 3, 4, 5, 6, 7]
    # the blocks in the middle are neighbours, so this rank has one slice of them
    second = slice_segments(cu_seqlens, rank_ranges(8, 1, 2))
    assert (second.spans().lengths_q, second.spans().lengths_k) == ([4], [5])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_indices_after_gathering(size):
    total = 60
    shards = [np.concatenate([np.arange(*r) for r in rank_ranges(total, rank, size)]) for rank in range(size)]
    gathered = np.concatenate(shards)
    assert all(len(shard) == total // size for shard in shards)
    if size > 1:
        assert gathered[gathered_indices(np.arange(total), total, size)].tolist() == list(range(total))


def test_work_is_balanced():
    """The reason for two blocks a rank: of one long segment each rank computes the same number of pairs."""
    total, size = 64, 4
    counts = []
    for rank in range(size):
        spans = slice_segments(np.array([0, total], dtype=np.int32), rank_ranges(total, rank, size)).spans()
        counts.append(sum(q * k - q * (q - 1) // 2 for q, k in zip(spans.lengths_q, spans.lengths_k, strict=True)))
    assert max(counts) == min(counts)


def test_streams_that_cannot_be_cut():
    with pytest.raises(ValueError, match="10 tokens cannot be cut into 2 × 2 equal blocks"):
        rank_ranges(10, 0, 2)


def test_spans_on_the_device_and_on_the_host():
    spans = Spans.of(np.array([2, 3]), np.array([5, 3]))
    assert [spans.cu_q.tolist(), spans.cu_k.tolist()] == [[0, 2, 5], [0, 5, 8]]
    assert [str(spans.cu_q.dtype), str(spans.cu_k.dtype)] == ["torch.int32", "torch.int32"]
    assert all(type(length) is int for length in (*spans.lengths_q, *spans.lengths_k, spans.max_q, spans.max_k))
