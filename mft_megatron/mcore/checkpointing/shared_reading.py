"""Reading of weights once for all ranks that hold the same: each reads a part, and sends it to the others.

::

    round     rank 0 reads weight 0 │ rank 1 reads weight 1 │ …       all at the same time, into the host's memory
              every rank learns what has been read, and its dtype
              rank 0 sends weight 0 in pieces, rank 1 sends weight 1, …

A rank has one weight in the host's memory, as if it read alone, and on its device one piece. The largest weights are
first, so that those of a round are about equally large.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from mft_megatron.errors import InputError
from mft_megatron.mcore.platform import devices

from .weight_source import WeightSlice, WeightSource

# bytes of a piece, of which the sender and each receiver have one on their devices
PIECE_BYTES = 64 * 2**20
# all of torch, in an order that is the same on every rank
_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
_NOTHING, _REFUSED = -1, -2
# slices of one weight, such as gate and up projection, which a source reads at once
Slices: TypeAlias = Sequence[WeightSlice]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive rows of a slice.

    Attributes:
        weight: index of the weight among those asked for.
        part: index of the slice among those of the weight.
        first: first row in the slice, or first element of a vector.
        content: the rows, of the source's dtype; from another rank on this rank's device, otherwise on the CPU.
    """

    weight: int
    part: int
    first: int
    content: Tensor


class SharedReader:
    """Reads the weights that all ranks of a group ask for.

    Attributes:
        refusal: why this rank could not read a weight; ``None`` if it could. After a refusal of any rank of the group
            the ranks read no more and give zeros, because ranks of other groups wait for them.
    """

    def __init__(self, source: WeightSource, group: dist.ProcessGroup):
        """Prepare to read.

        Args:
            source: where weights are read from.
            group: ranks that ask for the same weights.
        """
        self.refusal: str | None = None
        self._source, self._group = source, group
        self._stopped = False

    def read(self, weights: Sequence[Slices], take: Callable[[Piece], None]) -> None:
        """Read all weights; a collective of the group.

        Args:
            weights: the slices of each; the same on every rank of the group.
            take: called with each piece, slice by slice of a weight and row by row.
        """
        size = self._group.size()
        order = sorted(range(len(weights)), key=lambda weight: -sum(math.prod(part.shape) for part in weights[weight]))
        for begin in range(0, len(order), size):
            self._read_round(weights, order[begin : begin + size], take)

    def _read_round(self, weights: Sequence[Slices], of_round: Sequence[int], take: Callable[[Piece], None]) -> None:
        """Read a weight on each rank of the group, and give all of them to every rank."""
        rank = self._group.rank()
        contents = self._try(weights[of_round[rank]]) if rank < len(of_round) else []
        for reader, (weight, dtype) in enumerate(zip(of_round, self._dtypes(contents), strict=False)):
            for part, wanted in enumerate(weights[weight]):
                own = contents[part] if reader == rank else None
                for first, content in self._pieces(wanted.shape, dtype, reader, own):
                    take(Piece(weight, part, first, content))

    def _try(self, slices: Slices) -> list[Tensor]:
        """The content of each slice, or zeros instead of a refusal."""
        if not self._stopped:
            try:
                return [self._source.read(wanted) for wanted in slices]
            except InputError as error:
                self.refusal = str(error)
            except (OSError, ValueError) as error:  # of a file that was whole when it was opened
                self.refusal = f"rank {dist.get_rank()} cannot read {slices[0].name} ({type(error).__name__}: {error})"
        return [torch.zeros(wanted.shape) for wanted in slices]

    def _dtypes(self, contents: Sequence[Tensor]) -> list[torch.dtype]:
        """The dtype of what each rank has read in this round; that of a rank without a weight means nothing."""
        code = _DTYPES.index(contents[0].dtype) if contents else _NOTHING
        own = torch.tensor([_REFUSED if self.refusal is not None else code], device=devices.device())
        codes = own.new_empty(self._group.size())
        dist.all_gather_into_tensor(codes, own, group=self._group)
        self._stopped = self._stopped or bool((codes == _REFUSED).any())
        # a rank that refuses gives zeros of fp32
        return [_DTYPES[code] if code >= 0 else torch.float32 for code in codes.tolist()]

    def _pieces(
        self, shape: Sequence[int], dtype: torch.dtype, reader: int, own: Tensor | None
    ) -> Iterator[tuple[int, Tensor]]:
        """Send a slice, or receive it from the rank ``reader`` of the group; yield first rows and contents."""
        if own is not None and self._group.size() == 1:
            yield 0, own
            return
        rows = max(1, PIECE_BYTES // (math.prod(shape[1:]) * dtype.itemsize))
        for first in range(0, shape[0], rows):
            count = min(rows, shape[0] - first)
            if own is not None:
                piece = own[first : first + count].to(devices.device()).contiguous()
            else:
                piece = torch.empty(count, *shape[1:], dtype=dtype, device=devices.device())
            # as bytes, since not every backend knows every dtype
            dist.broadcast(piece.view(torch.uint8), dist.get_global_rank(self._group, reader), group=self._group)
            yield first, piece
