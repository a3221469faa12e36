"""Which queries attend to which keys: the pieces of a stream that a rank computes.

::

    segments   |───── 0 ─────|── 1 ──|───────── 2 ─────────|
    own tokens       |───────────|           |─────|            ranges of the stream
    pieces           |── q0 ─|─q1|           |─ q2 ─|           keys of a piece: from its segment's start to its end

Where a rank has the whole stream, pieces are segments. Numbers are counted on the host, once per micro-batch, so that
no layer waits for the device to learn them.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Spans:
    """Pieces of attention: the queries of each lie one behind the other, and so do its keys.

    A piece's last query sees its last key, the one before it one key less, and so on: causal, aligned at the end.
    No piece has more queries than keys.

    ``lengths_q``, ``lengths_k``: queries and keys of each piece, on the host. ``cu_q``, ``cu_k`` int32 [pieces+1]:
    where they start, on the device, then how many there are. ``max_q``, ``max_k``: of the longest piece.
    """

    lengths_q: Sequence[int]
    lengths_k: Sequence[int]
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    @classmethod
    def of(cls, lengths_q: np.ndarray, lengths_k: np.ndarray, device: torch.device | str = "cpu") -> "Spans":
        """From int64 [pieces] twice."""
        return cls(
            lengths_q.tolist(),
            lengths_k.tolist(),
            *(_starts(lengths).to(device, non_blocking=True) for lengths in (lengths_q, lengths_k)),
            int(lengths_q.max()),
            int(lengths_k.max()),
        )


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Places in the stream, each int64 [pieces]: where the segment of a piece, its queries and its end lie."""

    segment: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def spans(self, device: torch.device | str = "cpu") -> Spans:
        return Spans.of(self.end - self.start, self.end - self.segment, device)

    def keys(self) -> np.ndarray:
        """Places in the stream of the keys, piece after piece, int64; a key is named once for each piece it is in."""
        lengths = self.end - self.segment
        ends = lengths.cumsum()
        return np.arange(ends[-1]) + np.repeat(self.segment - (ends - lengths), lengths)


def pieces(cu_seqlens: np.ndarray, ranges: Sequence[tuple[int, int]]) -> Pieces:
    """The parts of segments that lie in some ranges of the stream.

    Args:
        cu_seqlens: int [segments+1], where each segment starts, then the length of the stream.
        ranges: start and end of each; rising, apart from each other and not empty.
    """
    starts, ends = cu_seqlens[:-1].astype(np.int64), cu_seqlens[1:].astype(np.int64)
    found = []
    for first, last in ranges:
        begin, stop = np.maximum(starts, first), np.minimum(ends, last)
        inside = begin < stop
        found.append((starts[inside], begin[inside], stop[inside]))
    return Pieces(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _starts(lengths: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
