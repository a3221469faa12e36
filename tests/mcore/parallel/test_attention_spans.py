"""Which queries attend to which keys: every pair by the book, counted out of the pieces of all ranks."""

import itertools

import numpy as np
import pytest

from mft_megatron.mcore.parallel.attention_spans import Spans, pieces
from mft_megatron.mcore.parallel.context_parallel import gathered_places, own_ranges


def cut(total, seed):
    """Random segments of a stream, some of one token."""
    rng = np.random.default_rng(seed)
    borders = rng.choice(np.arange(1, total), size=rng.integers(0, total // 2), replace=False)
    return np.array([0, *sorted(borders), total], dtype=np.int32)


def pairs_by_the_book(cu_seqlens):
    """(query, key) of the whole stream."""
    return {
        (query, key)
        for start, end in itertools.pairwise(cu_seqlens.tolist())
        for query in range(start, end)
        for key in range(start, query + 1)
    }


def pairs_of(own, own_places):
    """(query, key) out of a rank's pieces, by the rule of :class:`Spans`: the last query sees the last key."""
    spans, keys, found = own.spans(), own.keys(), []
    for number, (queries, count) in enumerate(zip(spans.lengths_q, spans.lengths_k, strict=True)):
        first_query, first_key = int(spans.cu_q[number]), int(spans.cu_k[number])
        for query in range(queries):
            for key in range(count - queries + query + 1):
                found.append((int(own_places[first_query + query]), int(keys[first_key + key])))
    assert int(spans.cu_q[-1]) == len(own_places)
    assert int(spans.cu_k[-1]) == len(keys)
    assert (spans.max_q, spans.max_k) == (max(spans.lengths_q), max(spans.lengths_k))
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(6))
def test_each_pair_is_computed_once_by_one_rank(size, seed):
    total = 48
    cu_seqlens = cut(total, seed)
    found, places = [], []
    for rank in range(size):
        ranges = own_ranges(total, rank, size)
        own_places = np.concatenate([np.arange(*limits) for limits in ranges])
        found += pairs_of(pieces(cu_seqlens, ranges), own_places)
        places += own_places.tolist()
    assert sorted(found) == sorted(pairs_by_the_book(cu_seqlens))
    assert sorted(places) == list(range(total))


def test_the_whole_stream_is_its_segments():
    own = pieces(np.array([0, 3, 4, 10], dtype=np.int32), own_ranges(10, 0, 1))
    spans = own.spans()
    assert spans.lengths_q == spans.lengths_k == [3, 1, 6]
    assert own.keys().tolist() == list(range(10))


def test_a_segment_over_several_chunks():
    """Chunks of 2 tokens; the segment 1 … 7 lies in all four."""
    cu_seqlens = np.array([0, 1, 8], dtype=np.int32)
    first = pieces(cu_seqlens, own_ranges(8, 0, 2))
    assert first.spans().lengths_q == [1, 1, 2]
    assert first.spans().lengths_k == [1, 1, 7]
    assert first.keys().tolist() == [0, 1, 1, 2, 3, 4, 5, 6, 7]
    # the chunks in the middle are neighbours, so this rank has one piece of them
    second = pieces(cu_seqlens, own_ranges(8, 1, 2))
    assert (second.spans().lengths_q, second.spans().lengths_k) == ([4], [5])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_places_of_what_is_gathered(size):
    total = 60
    own = [np.concatenate([np.arange(*r) for r in own_ranges(total, rank, size)]) for rank in range(size)]
    joined = np.concatenate(own)
    assert all(len(part) == total // size for part in own)
    if size > 1:
        assert joined[gathered_places(np.arange(total), total, size)].tolist() == list(range(total))


def test_work_is_shared_evenly():
    """What the zigzag is for: of one long segment each rank has the same number of pairs, but for half a chunk."""
    total, size = 64, 4
    counts = []
    for rank in range(size):
        spans = pieces(np.array([0, total], dtype=np.int32), own_ranges(total, rank, size)).spans()
        counts.append(sum(q * k - q * (q - 1) // 2 for q, k in zip(spans.lengths_q, spans.lengths_k, strict=True)))
    assert max(counts) == min(counts)


def test_streams_that_cannot_be_cut():
    with pytest.raises(ValueError, match="10 tokens cannot be cut into 2 × 2 equal blocks"):
        own_ranges(10, 0, 2)


def test_spans_on_the_device_and_on_the_host():
    spans = Spans.of(np.array([2, 3]), np.array([5, 3]))
    assert [spans.cu_q.tolist(), spans.cu_k.tolist()] == [[0, 2, 5], [0, 5, 8]]
    assert [str(spans.cu_q.dtype), str(spans.cu_k.dtype)] == ["torch.int32", "torch.int32"]
    assert all(type(number) is int for number in (*spans.lengths_q, *spans.lengths_k, spans.max_q, spans.max_k))
