"""Queries and keys of attention: the segment slices of a stream that a rank computes.

::

    segments         |───── 0 ─────|── 1 ──|───────── 2 ─────────|
    the rank's tokens      |───────────|           |─────|            ranges of the stream
    segment slices         |── q0 ─|─q1|           |─ q2 ─|           keys: from the segment's start to the slice's end

Where a rank has the whole stream, the slices are the segments. Lengths are computed on the host, once per micro-batch,
so that no layer waits for the device to learn them.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Spans:
    """Queries and keys of segment slices, for an attention kernel; the slices are concatenated.

    A slice's last query sees its last key, the one before it one key less, and so on: causal, aligned at the end.
    No slice has more queries than keys.

    ``lengths_q``, ``lengths_k``: queries and keys of each slice, on the host. ``cu_q``, ``cu_k`` int32 [slices + 1]:
    where they start, then how many there are in all, on the device. ``max_q``, ``max_k``: the largest lengths.
    """

    lengths_q: Sequence[int]
    lengths_k: Sequence[int]
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    @classmethod
    def of(cls, lengths_q: np.ndarray, lengths_k: np.ndarray, device: torch.device | str = "cpu") -> "Spans":
        """Build the spans of some slices.

        Args:
            lengths_q: int64 [slices], queries of each.
            lengths_k: int64 [slices], keys of each.
            device: for ``cu_q`` and ``cu_k``.
        """
        return cls(
            lengths_q.tolist(),
            lengths_k.tolist(),
            _starts(lengths_q).to(device, non_blocking=True),
            _starts(lengths_k).to(device, non_blocking=True),
            int(lengths_q.max()),
            int(lengths_k.max()),
        )


@dataclasses.dataclass(frozen=True)
class SegmentSlices:
    """Parts of segments that a rank computes; token indices in the stream, each int64 [slices].

    ``segment``: first token of the slice's segment, which is its first key. ``start``, ``end``: its queries; ``end`` is
    also the end of its keys.
    """

    segment: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def spans(self, device: torch.device | str = "cpu") -> Spans:
        """Lengths of the slices, with tensors on ``device``."""
        return Spans.of(self.end - self.start, self.end - self.segment, device)

    def key_indices(self) -> np.ndarray:
        """Token indices of the keys, int64, slice after slice; a key of several slices is repeated."""
        lengths = self.end - self.segment
        ends = lengths.cumsum()
        return np.arange(ends[-1]) + np.repeat(self.segment - (ends - lengths), lengths)


def slice_segments(cu_seqlens: np.ndarray, ranges: Sequence[tuple[int, int]]) -> SegmentSlices:
    """Cut segments to the parts of them that are in some ranges of the stream.

    Args:
        cu_seqlens: int [segments + 1], where each segment starts, then the length of the stream.
        ranges: start and end of each; ascending, with gaps between them, and not empty.
    """
    starts, ends = cu_seqlens[:-1].astype(np.int64), cu_seqlens[1:].astype(np.int64)
    segments, slice_starts, slice_ends = [], [], []
    for first, last in ranges:
        begin, stop = np.maximum(starts, first), np.minimum(ends, last)
        inside = begin < stop
        segments.append(starts[inside])
        slice_starts.append(begin[inside])
        slice_ends.append(stop[inside])
    return SegmentSlices(np.concatenate(segments), np.concatenate(slice_starts), np.concatenate(slice_ends))


def _starts(lengths: np.ndarray) -> Tensor:
    """Starts of concatenated slices of these lengths, then their sum: int32 [slices + 1]."""
    return torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
