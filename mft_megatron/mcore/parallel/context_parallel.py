"""Context parallelism: the tokens of a micro-batch that a rank computes, and the keys that it needs of other ranks.

::

    stream of T tokens   | 0 | 1 | 2 | 3 |        2 · CP equal blocks
    rank 0 of 2            0           3          blocks r and 2 · CP - 1 - r: early tokens attend to few keys,
    rank 1 of 2                1   2              late ones to many, so each rank gets some of both

The stream is cut, not each of its samples, so no sample is padded and no datum is changed. Every rank has the whole
micro-batch (each builds it from the plan, and it is small next to the activations); keys and values are gathered in
each layer, and a rank takes those of its segment slices.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from mft_megatron.batch import Batch

from .attention_spans import Spans, slice_segments


@dataclasses.dataclass(frozen=True)
class ContextParallelShard:
    """The part of a micro-batch that one context-parallel rank computes; tensors are on its device.

    Attributes:
        spans: its attention.
        supervised_N: int64, indices, among the rank's tokens, of those with a supervised label.
        index_T: int64 [T / CP], indices of the rank's tokens in the stream, ascending; ``None`` where it is not cut.
        keys: int64 [keys], indices of the keys of ``spans`` in the gathered tokens; ``None`` where it is not cut.
        group: the context-parallel ranks; ``None`` where there is only one.
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
        """Build the shard of one of ``size`` ranks.

        Args:
            batch: on the host; its B·S tokens are a multiple of ``2 * size`` where ``size`` is above 1.
            rank: from 0 on.
            size: number of context-parallel ranks.
            device: for the tensors.
            group: the ranks; ``None`` where nothing is to be gathered or summed.

        Raises:
            ValueError: the tokens cannot be cut evenly.
        """
        length, supervised = batch.loss_mask_BS.size, batch.loss_mask_BS.ravel().astype(bool)
        ranges = rank_ranges(length, rank, size)
        slices = slice_segments(batch.cu_seqlens, ranges)
        index = np.concatenate([np.arange(*limits) for limits in ranges])
        spans, supervised_N = slices.spans(device), _to_device(np.flatnonzero(supervised[index]), device)
        if size == 1:
            return cls(spans, supervised_N)
        keys = gathered_indices(slices.key_indices(), length, size)
        return cls(spans, supervised_N, _to_device(index, device), _to_device(keys, device), group)

    def tensors(self) -> list[Tensor]:
        """All tensors of the shard, to be copied to a device together; see :meth:`with_tensors`."""
        optional = (self.index_T, self.keys)
        return [self.spans.cu_q, self.spans.cu_k, self.supervised_N, *(each for each in optional if each is not None)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "ContextParallelShard":
        """The same shard with these tensors in the place of :meth:`tensors`."""
        cu_q, cu_k, supervised_N, *cut = tensors
        index_T, keys = cut or (None, None)
        spans = dataclasses.replace(self.spans, cu_q=cu_q, cu_k=cu_k)
        return dataclasses.replace(self, spans=spans, supervised_N=supervised_N, index_T=index_T, keys=keys)

    def take(self, value_BS: Tensor) -> Tensor:
        """Select the rank's tokens: [B, S] of any dtype -> [T / CP]."""
        flat = value_BS.flatten()
        return flat if self.index_T is None else flat.index_select(0, self.index_T)

    def scatter(self, value_T: Tensor, length: int) -> Tensor:
        """Put values of the rank's tokens at their indices in the stream: [T / CP] -> [T].

        Tokens of other ranks are 0; differentiable.
        """
        if self.index_T is None:
            return value_T
        return value_T.new_zeros(length).index_copy(0, self.index_T, value_T)

    def supervised_indices(self) -> Tensor:
        """Indices in the stream of the rank's supervised tokens, int64 [N]."""
        return self.supervised_N if self.index_T is None else self.index_T.index_select(0, self.supervised_N)

    def token_mask(self, shape: torch.Size) -> Tensor | None:
        """Whether each token is this rank's, bool [B, S]; ``None`` where all are."""
        if self.index_T is None:
            return None
        mask_T = torch.zeros(shape.numel(), dtype=torch.bool, device=self.index_T.device)
        return mask_T.index_fill(0, self.index_T, True).view(shape)

    def gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Gather keys and values of all ranks' tokens and select those of this rank's segment slices.

        The backward pass sums the gradients over the ranks and gives each those of its tokens.

        Args:
            key: [T / CP, groups, d], of this rank's tokens.
            value: [T / CP, groups, d], of this rank's tokens.

        Returns:
            both as [keys, groups, d], in the order of ``spans``.
        """
        if self.keys is None:
            return key, value
        both = gather_from_sequence_parallel_region(torch.stack((key, value), dim=1), group=self.group)
        key, value = both.unbind(1)
        return key.index_select(0, self.keys), value.index_select(0, self.keys)

    def sum(self, value: Tensor) -> Tensor:
        """Sum a tensor of any shape over the ranks, the same on each of them; differentiable."""
        return value if self.group is None else _Sum.apply(value, self.group)


def shard_of(batch: Batch[np.ndarray], device: torch.device) -> ContextParallelShard:
    """Build this process's shard of a micro-batch of numpy arrays, with tensors on ``device``."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return ContextParallelShard.of(batch, 0, 1, device)
    return ContextParallelShard.of(
        batch, parallel_state.get_context_parallel_rank(), size, device, parallel_state.get_context_parallel_group()
    )


def rank_ranges(length: int, rank: int, size: int) -> list[tuple[int, int]]:
    """Start and end of a rank's blocks in a stream of ``length`` tokens; one range where its blocks are neighbours.

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


def gathered_indices(indices: np.ndarray, length: int, size: int) -> np.ndarray:
    """Indices of tokens after the tokens of all ranks are concatenated in the order of the ranks.

    Args:
        indices: int64 [n], token indices in a stream of ``length`` tokens.
        length: a multiple of ``2 * size``.
        size: number of context-parallel ranks.

    Returns:
        int64 [n].
    """
    block = length // (2 * size)
    block_index, offset = np.divmod(indices, block)
    rank = np.minimum(block_index, 2 * size - 1 - block_index)
    return (2 * rank + (block_index >= size)) * block + offset


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


class _Sum(torch.autograd.Function):
    """A sum over ranks of which each computes its part of the objective: their gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_reduced(value, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(gradient, ctx.group), None


def _all_reduced(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
