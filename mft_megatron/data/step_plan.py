"""What each step consumes: a pure function of (data set, split, seed, global batch size, consumed samples).

The packs form an endless stream: epoch after epoch, each in an order of its own. A global batch takes the next packs of
the stream, so an epoch uses every pack exactly once, for any data-parallel size, and the last, incomplete global batch
of an epoch is filled from the next. Every rank computes the same plan; resuming needs one number.
"""

import functools
from collections.abc import Iterator

import numpy as np

from mft_megatron.batch import StepPlan
from mft_megatron.data.dataset import PackedSplit
from mft_megatron.data.order import named_order


def plan_step(split: PackedSplit, *, seed: int, global_batch_size: int, consumed_samples: int) -> StepPlan:
    """The plan of the step that comes after ``consumed_samples`` packs.

    Raises:
        ValueError: ``consumed_samples`` is negative or ``global_batch_size`` below 1.
    """
    if consumed_samples < 0 or global_batch_size < 1:
        raise ValueError(f"consumed_samples {consumed_samples}, global_batch_size {global_batch_size}")
    stream = np.arange(consumed_samples, consumed_samples + global_batch_size)
    epochs, places = np.divmod(stream, split.num_packs)
    packs_G = np.empty(global_batch_size, np.int64)
    for epoch in np.unique(epochs):
        order = epoch_order(split.dataset.dataset_hash, split.name, seed, int(epoch), split.num_packs)
        packs_G[epochs == epoch] = order[places[epochs == epoch]]
    return StepPlan(packs_G, *split.counts(packs_G))


def plan_evaluation(split: PackedSplit, global_batch_size: int) -> Iterator[StepPlan]:
    """Plans that go through the whole split once, in order; the last is filled up with empty rows."""
    for start in range(0, split.num_packs, global_batch_size):
        packs_G = np.arange(start, start + global_batch_size)
        packs_G[packs_G >= split.num_packs] = -1
        yield StepPlan(packs_G, *split.counts(packs_G))


@functools.lru_cache(maxsize=4)
def epoch_order(dataset_hash: str, split: str, seed: int, epoch: int, num_packs: int) -> np.ndarray:
    """Order of the packs in one epoch, int64 [packs], not to be written to."""
    order = named_order(f"{dataset_hash}/{split}/{seed}/{epoch}", num_packs)
    order.setflags(write=False)
    return order
