"""The tensors of a checkpoint that a weight is stored as, and the blocks of them that a slice of the weight needs."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from mft_megatron.mcore.parallel.sharded_weights import shards_in

Sharded: TypeAlias = "ShardedTensor | ShardedTensorFactory"


@dataclasses.dataclass(frozen=True)
class StoredPart:
    """A part of a weight that is a shard in a checkpoint: the whole weight, or one of gate and up projection.

    Attributes:
        shard: its place in the checkpoint, without content.
        start: the first of its elements in the flattened weight.
        end: the element after its last one.
    """

    shard: ShardedTensor
    start: int
    end: int

    @property
    def is_main(self) -> bool:
        """Whether this rank's data-parallel group stores the part: no other tensor- or pipeline-parallel rank does."""
        return not any(self.shard.replica_id[:-1])

    def holding(self, content: Tensor, kind: str, replica: int) -> ShardedTensor:
        """The shard of a state of the optimizer.

        Args:
            content: of the part's shape.
            kind: prefix of the state's name.
            replica: 0 for the one that is stored.
        """
        return dataclasses.replace(
            self.shard,
            key=f"{kind}.{self.shard.key}",
            data=content,
            dtype=content.dtype,
            replica_id=(*self.shard.replica_id[:-1], replica),
        )

    def block(self, start: int, end: int, kind: str) -> tuple[ShardedTensor, int]:
        """The smallest block of rows that holds some elements of the part, to load into.

        Args:
            start: the first element, in the flattened part.
            end: the element after the last one.
            kind: prefix of the state's name.

        Returns:
            the block, fp32 in the host's memory with undefined content, and the place of the first element in the
            flattened block.
        """
        offset, shape = covering_block(self.shard.local_shape, start, end)
        stacked, whole = self.shard.prepend_axis_num, self.shard.global_offset
        content = torch.empty(*(1 for _ in range(stacked)), *shape, dtype=torch.float32)
        shard = dataclasses.replace(
            self.shard,
            key=f"{kind}.{self.shard.key}",
            data=content,
            dtype=content.dtype,
            local_shape=tuple(content.shape),
            global_offset=(*whole[:stacked], *(a + b for a, b in zip(whole[stacked:], offset, strict=True))),
            # blocks are no regular grid; Megatron-Core wants the content of such with all axes
            axis_fragmentations=None,
            prepend_axis_num=0,
            replica_id=0,
        )
        return shard, start - _position(offset, self.shard.local_shape)


def stored_parts(entry: Sharded) -> Iterator[StoredPart]:
    """Yield the parts that a weight is stored as.

    Args:
        entry: the weight's entry in a sharded state dict, with the weight as its content.

    Raises:
        TypeError: a part is no contiguous range of the flattened weight.
    """
    for shard in shards_in([entry]):
        if not shard.data.is_contiguous():
            raise TypeError(f"{shard.key}: a part of the weight is not contiguous, so it has no range of its states")
        start = shard.data.storage_offset() - entry.data.storage_offset()
        yield StoredPart(shard.without_data(), start, start + shard.data.numel())


def covering_block(shape: Sequence[int], start: int, end: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The smallest block with whole rows that holds elements ``start`` to ``end`` of a flattened tensor.

    Args:
        shape: of the tensor, with at least one axis.
        start: the first element.
        end: the element after the last one; at least one element is asked for.

    Returns:
        offset and shape of the block. It is contiguous in the tensor.
    """
    offset, size = [], []
    for axis in range(len(shape)):
        row = math.prod(shape[axis + 1 :])
        first, last = start // row, (end - 1) // row
        offset.append(first)
        size.append(last - first + 1)
        if first != last:
            break
        start, end = start - first * row, end - first * row
    rest = shape[len(offset) :]
    return (*offset, *(0 for _ in rest)), (*size, *rest)


def _position(offset: Sequence[int], shape: Sequence[int]) -> int:
    """Position in the flattened tensor of the element at ``offset``."""
    return sum(index * math.prod(shape[axis + 1 :]) for axis, index in enumerate(offset))
