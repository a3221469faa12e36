"""The plan of each step, a pure function of (data set, split, seed, order, global batch size, consumed samples).

The packs form an endless stream: epoch after epoch, each in another order (:mod:`.epoch_order`). A global batch takes
the next packs of the stream, so an epoch uses every pack exactly once for any data-parallel size, and the last,
incomplete global batch of an epoch is filled from the next epoch. Where the stream has an end (``--num-train-epochs``),
the last global batch holds the packs before it and no more. Every rank computes the same plan; resuming needs one
number.

The rows of a global batch are distributed over the ranks by their cost (:func:`shard_plan`). That changes nothing but
the order of a sum.
"""

from collections.abc import Iterator

import numpy as np

from mft_megatron.batch import Ranks, StepPlan
from mft_megatron.data import _sample_index

from .dataset import PackedSplit
from .epoch_order import epoch_order


def plan_step(
    split: PackedSplit,
    *,
    seed: int,
    global_batch_size: int,
    consumed_samples: int,
    end: int | None = None,
    batch_multiple: int = 1,
    order_version: int | None = None,
) -> StepPlan:
    """Plan the step that comes after ``consumed_samples`` packs.

    Args:
        split: of the packs.
        seed: of their order.
        global_batch_size: packs of the step.
        consumed_samples: packs of the stream before the step.
        end: packs of the whole stream; ``None`` for one without an end. The step that reaches it has the packs before
            it alone, filled up with empty rows to a multiple of ``batch_multiple``.
        batch_multiple: rows that the ranks and the pipeline need at least.
        order_version: of :mod:`.epoch_order`; ``None`` for that of the data set, which a run that resumes may not have
            begun with.

    Raises:
        ValueError: ``consumed_samples`` is negative or not before the end, or ``global_batch_size`` is below 1.
    """
    remaining = global_batch_size if end is None else min(end - consumed_samples, global_batch_size)
    if consumed_samples < 0 or remaining < 1:
        raise ValueError(f"consumed_samples {consumed_samples}, global_batch_size {global_batch_size}, end {end}")
    rows = global_batch_size if remaining == global_batch_size else -(-remaining // batch_multiple) * batch_multiple
    epochs_G, indices = np.divmod(np.arange(consumed_samples, consumed_samples + rows), split.num_packs)
    packs_G = np.empty(rows, np.int64)
    order_version = split.dataset.entry.order_version if order_version is None else order_version
    for epoch in np.unique(epochs_G[:remaining]):
        order = epoch_order(split, seed, int(epoch), order_version)
        packs_G[epochs_G == epoch] = order[indices[epochs_G == epoch]]
    packs_G[remaining:] = -1
    return _plan(split, packs_G, epochs_G)


def plan_evaluation(split: PackedSplit, global_batch_size: int) -> Iterator[StepPlan]:
    """Plan one pass over the whole split, in order; the last plan is filled up with empty rows."""
    for start in range(0, split.num_packs, global_batch_size):
        packs_G = np.arange(start, start + global_batch_size)
        packs_G[packs_G >= split.num_packs] = -1
        yield _plan(split, packs_G, np.zeros_like(packs_G))


def plan_longest(split: PackedSplit, rows: int) -> StepPlan:
    """Plan a step of the rows that cost most, repeated where the split has fewer than ``rows``."""
    costs_G = row_costs(split, np.arange(split.num_packs))
    packs_G = np.resize(np.argsort(-costs_G, kind="stable")[:rows], rows)
    return _plan(split, packs_G, np.zeros_like(packs_G))


def _plan(split: PackedSplit, packs_G: np.ndarray, epochs_G: np.ndarray) -> StepPlan:
    return StepPlan(packs_G, split.counts(packs_G), epochs_G, row_costs(split, packs_G))


def row_costs(split: PackedSplit, packs_G: np.ndarray) -> np.ndarray:
    """Computational cost of each row, int64 [G]; 0 for -1, the empty pack.

    Packed rows differ only in their attention: Σ length² of their segments. Padded rows, which are only as wide as
    necessary, differ in everything: their length.

    Args:
        split: of the packs.
        packs_G: int64 [G], indices of packs.
    """
    slices, counts = split.slices_of_packs(packs_G)
    row = np.repeat(np.arange(len(packs_G)), counts)
    lengths = slices.lengths if split.dataset.joined or split.dataset.padded else slices.lengths**2
    costs_G = np.zeros(len(packs_G), np.int64)
    np.add.at(costs_G, row, lengths)
    return costs_G**2 if split.dataset.joined else costs_G


def shard_plan(plan: StepPlan, ranks: Ranks, micro_batch_size: int, padded: bool) -> np.ndarray:
    """Choose the rows of one data-parallel rank: indices into the plan, int64 [micro-batches, ``micro_batch_size``].

    All ranks get the same number of rows and about the same total cost, each from the most expensive row to the
    cheapest, so that rows that are computed at the same time cost about the same. A single rank takes packed rows in
    the order of the plan.

    Args:
        plan: of the step; empty rows have cost 0 and are distributed like all others.
        ranks: position of the rank.
        micro_batch_size: rows of a micro-batch.
        padded: a micro-batch is as wide as its longest row, so rows of similar length share one, and micro-batches are
            distributed instead of rows.

    Raises:
        ValueError: G is not a multiple of ``micro_batch_size * data_size``.
    """
    if len(plan.packs_G) % (micro_batch_size * ranks.data_size):
        raise ValueError(f"{len(plan.packs_G)} rows for {ranks.data_size} ranks, {micro_batch_size} at a time")
    if padded:
        micro_batches = np.argsort(-plan.costs_G, kind="stable").reshape(-1, micro_batch_size)
        widths = np.ascontiguousarray(plan.costs_G[micro_batches[:, 0]])
        return micro_batches[_sample_index.balance(widths, ranks.data_size)[ranks.data_rank]]
    if ranks.data_size == 1:
        return np.arange(len(plan.packs_G)).reshape(-1, micro_batch_size)
    return _sample_index.balance(plan.costs_G, ranks.data_size)[ranks.data_rank].reshape(-1, micro_batch_size)
