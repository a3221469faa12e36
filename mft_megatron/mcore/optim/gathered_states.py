"""The states of a distributed optimizer gathered to be stored: each stored part on one rank, in bounded rounds.

Ranks have slices of flat buffers, which cut weights anywhere; a checkpoint has whole weights of a tensor- and
pipeline-parallel rank. So each part of a weight is given to one rank of the data-parallel group, its writer, about as
many elements to each. In a round all ranks send the pieces that writers are due to get and have not yet; that is one
message to each rank. On the device a rank needs memory for a round's pieces, and in the host's for the parts that it
writes.

Megatron-Core's own gathering confuses offsets in the padded buffer with offsets in a buffer without the padding between
buckets: with several buckets, states would be stored at wrong offsets.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

from mft_megatron.mcore.platform import devices

from .slices import kinds_of, read_state, slice_of_rank
from .stored_parts import StoredPart

# elements that all ranks of a group send in a round: at most 128 MiB of any rank
ROUND = 2**25


@dataclasses.dataclass(frozen=True)
class Sliced:
    """A stored part of a weight and where the ranks' slices of it are.

    Attributes:
        weight: the weight.
        part: the part.
        start: the part's first element in the weight's bucket.
        slice: elements of the bucket that each rank has.
    """

    weight: Parameter
    part: StoredPart
    start: int
    slice: int

    @property
    def numel(self) -> int:
        """Elements of the part."""
        return self.part.end - self.part.start


@dataclasses.dataclass(frozen=True)
class Piece:
    """Elements of a part that one rank has and another one writes.

    Attributes:
        part: index of the part.
        start: the first element, in the flattened part.
        end: the element after the last one.
        owner: the rank of the group that has them.
        writer: the rank of the group that writes them.
    """

    part: int
    start: int
    end: int
    owner: int
    writer: int

    @property
    def numel(self) -> int:
        """Elements of the piece."""
        return self.end - self.start


def sliced_parts(optimizer: DistributedOptimizer, parts: Mapping[int, Sequence[StoredPart]]) -> list[Sliced]:
    """Parts of all weights of the optimizer, the same on all ranks of its group.

    Args:
        optimizer: with buffers.
        parts: stored parts by the weight's ``id``.
    """
    found, ranks = [], optimizer.data_parallel_group.size()
    for buffer in optimizer.buffers:
        for bucket in buffer.buckets:
            share = bucket.grad_data.numel() // ranks
            for weight, (start, _, _) in buffer.param_index_map.items():
                if weight in bucket.params:
                    found += [
                        Sliced(weight, part, start + part.start - bucket.offset, share) for part in parts[id(weight)]
                    ]
    return found


def writers_of(sizes: Sequence[int], ranks: int) -> list[int]:
    """The rank that writes each part: the largest part first, to the rank with the fewest elements so far.

    Args:
        sizes: elements of each part.
        ranks: of the group.
    """
    writers, loads = [0] * len(sizes), [0] * ranks
    for part in sorted(range(len(sizes)), key=lambda part: (-sizes[part], part)):
        writers[part] = loads.index(min(loads))
        loads[writers[part]] += sizes[part]
    return writers


def rounds_of(parts: Sequence[Sliced], writers: Sequence[int], ranks: int, elements: int) -> Iterator[list[Piece]]:
    """Yield the pieces of each round, by writer and, for each, in the order in which it fills its parts.

    Args:
        parts: in the order of their index.
        writers: the rank that writes each part.
        ranks: of the group.
        elements: of a round, shared evenly by the writers.
    """

    def pieces(writer: int) -> Iterator[Piece]:
        for index, part in enumerate(parts):
            if writers[index] == writer:
                start, end, size = part.start, part.start + part.numel, part.slice
                for owner in range(start // size, (end - 1) // size + 1):
                    first, last = max(start, owner * size), min(end, (owner + 1) * size)
                    yield Piece(index, first - start, last - start, owner, writer)

    of_writers = [_in_rounds(pieces(writer), max(1, elements // ranks)) for writer in range(ranks)]
    for of_round in itertools.zip_longest(*of_writers, fillvalue=[]):
        yield list(itertools.chain(*of_round))


def _in_rounds(pieces: Iterable[Piece], elements: int) -> Iterator[list[Piece]]:
    """One writer's pieces of each round, cut so that no round has more elements."""
    current: list[Piece] = []
    left = elements
    for piece in pieces:
        while piece.numel > left:
            current.append(dataclasses.replace(piece, end=piece.start + left))
            piece = dataclasses.replace(piece, start=piece.start + left)
            yield [one for one in current if one.numel]
            current, left = [], elements
        current.append(piece)
        left -= piece.numel
    if current:
        yield current


def gathered_states(
    optimizer: DistributedOptimizer, parts: Sequence[Sliced], elements: int = ROUND
) -> Iterator[tuple[int, str, Tensor]]:
    """Gather the states of all parts and yield those that this rank writes; a collective of the optimizer's group.

    Args:
        optimizer: it has stepped.
        parts: the same on all ranks.
        elements: of a round.

    Yields:
        index of the part, kind, and the state, fp32 of the part's shape in the host's memory.
    """
    group = optimizer.data_parallel_group
    rank, ranks = group.rank(), group.size()
    writers = writers_of([part.numel for part in parts], ranks)
    kinds = [kinds_of(part.weight) for part in parts]
    for kind in dict.fromkeys(itertools.chain(*kinds)):
        chosen = [number for number in range(len(parts)) if kind in kinds[number]]
        of_kind = [parts[number] for number in chosen]
        states = {
            number: torch.empty(parts[number].part.shard.local_shape, dtype=torch.float32)
            for number in chosen
            if writers[number] == rank
        }
        for pieces in rounds_of(of_kind, [writers[number] for number in chosen], ranks, elements):
            received, position = _exchange(optimizer, of_kind, kind, pieces), 0
            due = [piece for piece in pieces if piece.writer == rank]
            for piece in sorted(due, key=lambda piece: piece.owner):
                state = states[chosen[piece.part]].view(-1)[piece.start : piece.end]
                state.copy_(received[position : position + piece.numel])
                position += piece.numel
            del received
        for number, state in states.items():
            yield number, kind, state


def _exchange(optimizer: DistributedOptimizer, parts: Sequence[Sliced], kind: str, pieces: Sequence[Piece]) -> Tensor:
    """Send and receive the pieces of a round.

    Returns:
        the elements that this rank writes, by owner and then in the order of the pieces, fp32 in the host's memory.
    """
    group = optimizer.data_parallel_group
    rank = group.rank()
    sent, due = [0] * group.size(), [0] * group.size()
    for piece in pieces:
        if piece.owner == rank:
            sent[piece.writer] += piece.numel
        if piece.writer == rank:
            due[piece.owner] += piece.numel
    outgoing = torch.empty(sum(sent), device=devices.device())
    position, weight, state = 0, None, outgoing
    for piece in pieces:
        if piece.owner == rank:
            part = parts[piece.part]
            if weight is not part.weight:
                weight, state = part.weight, read_state(optimizer, part.weight, kind)
            first = part.part.start + piece.start - slice_of_rank(optimizer, weight)[0]
            outgoing[position : position + piece.numel] = state[first : first + piece.numel]
            position += piece.numel
    incoming = outgoing.new_empty(sum(due))
    dist.all_to_all_single(incoming, outgoing, due, sent, group=group)
    return incoming.cpu()
