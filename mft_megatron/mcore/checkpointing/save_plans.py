"""The plan of a run's saves: who writes what, kept from one save to the next while the states have one structure.

Megatron-Core plans a save by gathering lists of all shards from all ranks, four times, and assembles the index of the
whole checkpoint. A strategy that is kept does so in its first two saves alone, and trusts that nothing changes. Here
the ranks compare their shards with those of the save before, and agree on a new strategy where any of them differ: the
optimizer has no states before its first step, for example.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.platform.megatron_fixes import write_without_results_process

from .writers.save_in_progress import SaveStrategy

AnyStrategy: TypeAlias = "SaveStrategy | FullyParallelSaveStrategyWrapper"

write_without_results_process()


class SavePlans:
    """The strategy of a run's saves, with what it has planned.

    Attributes:
        strategy: of the next save.
        is_new: whether the next save is planned in full, and checked for shards that no rank or several would write.
        bytes: size of all tensors that the next save writes.
    """

    def __init__(self, replicas: torch.distributed.ProcessGroup | None):
        """Prepare the first save.

        Args:
            replicas: ranks that have the same weights, which share the writing; ``None``: the first of them writes.
        """
        # a rank whose weights no other has shares with no one, and Megatron-Core would check it in every save
        self._replicas = replicas if replicas is not None and replicas.size() > 1 else None
        self._shards: list[tuple[object, ...]] | None = None
        self.strategy, self.is_new, self.bytes = self._new_strategy(), True, 0

    def adapt(self, state: dict[str, Any]) -> None:
        """Make a new plan if any rank has other shards than in the save before; a collective of all ranks.

        Args:
            state: the sharded state dict to be saved.
        """
        shards = list(_shards(state))
        facts = torch.tensor([shards != self._shards, _bytes(state)], device=devices.device())
        changed, self.bytes = process_groups.sum_over_world(facts).tolist()
        self.is_new = changed > 0
        if self.is_new:
            self.strategy, self._shards = self._new_strategy(), shards

    def _new_strategy(self) -> AnyStrategy:
        # two files by rank, as many as its threads; by default it is one since 0.19
        strategy = SaveStrategy("torch_dist", 1, thread_count=2, cached_metadata=True)
        if self._replicas is None:
            return strategy
        return FullyParallelSaveStrategyWrapper(strategy, self._replicas, do_cache_distribution=True)


def _shards(state: dict[str, Any]) -> Iterator[tuple[object, ...]]:
    """Describe each shard by all that plans depend on: key, position, shape, dtype and number of the replica."""
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor):
            where = (entry.global_shape, entry.global_offset, entry.axis_fragmentations, entry.flattened_range)
            yield entry.key, entry.replica_id, entry.dtype, entry.local_shape, *where
        elif isinstance(entry, ShardedTensorFactory):
            yield entry.key, entry.replica_id, entry.data.dtype, tuple(entry.data.shape)
        elif isinstance(entry, ShardedObject):
            yield entry.unique_key, entry.replica_id


def _bytes(state: dict[str, Any]) -> int:
    """Bytes of the tensors that no other rank has, or of which this one's replica is the one that is written."""
    return sum(
        math.prod(entry.data.shape) * entry.data.dtype.itemsize
        for entry in nested_values(state)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
        and isinstance(entry.data, torch.Tensor)
        and is_main_replica(entry.replica_id)
    )
