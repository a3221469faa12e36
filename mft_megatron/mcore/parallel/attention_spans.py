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

    Attributes:
        lengths_q: queries of each slice, on the host.
        lengths_k: keys of each slice, on the host.
        cu_q: int32 [slices + 1], first query of each slice, then how many there are in all; on the device.
        cu_k: int32 [slices + 1], the same of keys.
        max_q: queries of the slice with the most.
        max_k: keys of the slice with the most.
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
    """Parts of segments that a rank computes, as token indices in the stream.

    Attributes:
        segment: int64 [slices], first token of the slice's segment, which is the slice's first key.
        start: int64 [slices], first query.
        end: int64 [slices], end of the queries and of the keys.
    """

    segment: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def spans(self, device: torch.device | str = "cpu") -> Spans:
        """Lengths of the slices, with tensors on ``device``."""
        return Spans.of(self.end - self.start, self.end - self.segment, device)

    def key_indices(self) -> np.ndarray:
        """Token indices of the keys, int64 [keys], slice after slice; a key of several slices is repeated."""
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
