"""Context parallelism: which tokens of a micro-batch a rank computes, and what it needs of the others.

::

    stream of T tokens   | 0 | 1 | 2 | 3 |        2 · CP equal blocks
    rank 0 of 2            0           3          blocks r and 2 · CP - 1 - r: early tokens attend to few keys,
    rank 1 of 2                1   2              late ones to many, so each rank gets some of both

The stream is cut, not each of its samples, so no sample is padded and no datum is changed. Every rank knows the whole
micro-batch (it is made from the plan, and small beside the activations); keys and values are gathered in each layer,
and a rank takes those of its own pieces.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from mft_megatron.batch import Batch

from .attention_spans import Spans, pieces


@dataclasses.dataclass(frozen=True)
class ContextParallelShard:
    """What of a micro-batch one context-parallel rank computes; tensors lie on its device.

    ``spans``: its attention. ``supervised_N`` int64: which of its tokens have a target that counts, by their number
    among its tokens. Where ranks share the stream also: ``index_T`` int64 [T / CP], places of its tokens in the stream,
    rising; ``keys`` int64, places of the keys of ``spans`` in what is gathered from the ranks; ``group``, the ranks.
    """

    spans: Spans
    supervised_N: Tensor
    index_T: Tensor | None = None
    keys: Tensor | None = None
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(
        cls,
        batch: Batch[np.ndarray],
        rank: int,
        size: int,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> "ContextParallelShard":
        """Of one of ``size`` ranks.

        Args:
            batch: as arrays; its B·S tokens are a multiple of ``2 * size`` where ``size`` is above 1.
        """
        length, supervised = batch.loss_mask_BS.size, batch.loss_mask_BS.ravel().astype(bool)
        ranges = own_ranges(length, rank, size)
        own = pieces(batch.cu_seqlens, ranges)
        places = np.concatenate([np.arange(*limits) for limits in ranges])
        there = lambda array: torch.from_numpy(array).to(device, non_blocking=True)  # noqa: E731
        spans, supervised_N = own.spans(device), there(np.flatnonzero(supervised[places]))
        if size == 1:
            return cls(spans, supervised_N)
        return cls(spans, supervised_N, there(places), there(gathered_places(own.keys(), length, size)), group)

    def take(self, value_BS: Tensor) -> Tensor:
        """A value of each token of the micro-batch, of the rank's own tokens alone: [B, S] -> [T / CP]."""
        flat = value_BS.flatten()
        return flat if self.index_T is None else flat.index_select(0, self.index_T)

    def scatter(self, value_T: Tensor, length: int) -> Tensor:
        """The other way round, with 0 for tokens of other ranks: [T / CP] -> [T]; differentiable."""
        if self.index_T is None:
            return value_T
        return value_T.new_zeros(length).index_copy(0, self.index_T, value_T)

    def supervised_indices(self) -> Tensor:
        """``supervised_N`` by the place in the stream."""
        return self.supervised_N if self.index_T is None else self.index_T.index_select(0, self.supervised_N)

    def token_mask(self, shape: torch.Size) -> Tensor | None:
        """Whether a token is the rank's own, bool [B, S]; ``None`` where all are."""
        if self.index_T is None:
            return None
        mine_T = torch.zeros(shape.numel(), dtype=torch.bool, device=self.index_T.device)
        return mine_T.index_fill(0, self.index_T, True).view(shape)

    def gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the rank's pieces, from those of all ranks' own tokens.

        The backward pass sums the gradients over the ranks and gives each those of its own tokens.

        Args:
            key, value: [T / CP, groups, d], of the rank's own tokens.

        Returns:
            the same, in the order of ``spans``.
        """
        if self.keys is None:
            return key, value
        both = gather_from_sequence_parallel_region(torch.stack((key, value), dim=1), group=self.group)
        key, value = (tensor.index_select(0, self.keys) for tensor in both.unbind(1))
        return key, value

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor over the ranks, the same on each of them; differentiable."""
        return value if self.group is None else _Sum.apply(value, self.group)


def shard_of(batch: Batch[np.ndarray], device: torch.device) -> ContextParallelShard:
    """Of this process; ``batch`` as arrays."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return ContextParallelShard.of(batch, 0, 1, device)
    return ContextParallelShard.of(
        batch, parallel_state.get_context_parallel_rank(), size, device, parallel_state.get_context_parallel_group()
    )


def own_ranges(length: int, rank: int, size: int) -> list[tuple[int, int]]:
    """Where in a stream of ``length`` tokens the blocks of a rank lie; one range where its blocks are neighbours.

    Raises:
        ValueError: the stream cannot be cut evenly.
    """
    if size == 1:
        return [(0, length)]
    if length % (2 * size):
        raise ValueError(f"{length} tokens cannot be cut into 2 × {size} equal blocks")
    block, mirror = length // (2 * size), 2 * size - 1 - rank
    if rank + 1 == mirror:
        return [(rank * block, (mirror + 1) * block)]
    return [(rank * block, (rank + 1) * block), (mirror * block, (mirror + 1) * block)]


def gathered_places(places: np.ndarray, length: int, size: int) -> np.ndarray:
    """Where tokens of the stream lie once the own tokens of all ranks are joined, rank after rank; int64."""
    block = length // (2 * size)
    number, offset = np.divmod(places, block)
    rank = np.minimum(number, 2 * size - 1 - number)
    return (2 * rank + (number >= size)) * block + offset


class _Sum(torch.autograd.Function):
    """A sum over ranks, each of which makes its own part of the objective of it: their gradients add up, too."""

    @staticmethod
    def forward(ctx, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed(value, group)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _summed(gradient, ctx.group), None


def _summed(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
