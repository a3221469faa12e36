"""The order of the data: every pack exactly once an epoch for any data-parallel size, the same on every rank."""

import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_megatron.batch import Ranks, StepPlan
from mft_megatron.data._sample_index import best_fit_decreasing
from mft_megatron.data.loading.epoch_order import epoch_order
from mft_megatron.data.loading.step_plan import plan_evaluation, plan_step, shard_plan
from mft_megatron.data.sample_slices import SampleSlices
from tests.made_dataset import batch_of_packs
from tests.task_counts import counted


class Packs:
    """The part of a split that a plan needs.

    Task p % 2 has p + 1 supervised tokens in pack p, which has a slice of p + 1 tokens and one of 2.
    """

    def __init__(self, num_packs, dataset_hash="hash", name="train", joined=False, padded=False, order_version=2):
        self.num_packs, self.name = num_packs, name
        entry = types.SimpleNamespace(order_version=order_version)
        self.dataset = types.SimpleNamespace(dataset_hash=dataset_hash, joined=joined, padded=padded, entry=entry)
        self.rarest_tasks = np.arange(num_packs, dtype=np.int32) % 2

    def slices_of_packs(self, packs_G):
        real = packs_G[packs_G >= 0]
        samples = np.stack([2 * real, 2 * real + 1], 1).ravel()
        lengths = np.stack([real + 1, np.full_like(real, 2)], 1).ravel()
        return SampleSlices(samples, np.zeros_like(samples), lengths), np.where(packs_G >= 0, 2, 0)

    def counts(self, packs_G):
        real = packs_G[packs_G >= 0]
        tokens_K, samples_K = np.zeros(2, np.int64), np.zeros(2, np.int64)
        np.add.at(tokens_K, real % 2, real + 1)
        np.add.at(samples_K, real % 2, 1)
        return counted(tokens_K, samples_K)


def stream(split, steps, size, seed=1, start=0):
    """Packs of some steps, concatenated."""
    plans = [
        plan_step(split, seed=seed, global_batch_size=size, consumed_samples=start + size * step)
        for step in range(steps)
    ]
    return np.concatenate([plan.packs_G for plan in plans])


@settings(deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 2**40),
    st.sampled_from([1, 2]),
)
def test_an_epoch_uses_every_pack_once_for_any_data_parallel_size(
    num_packs, data_size, micro, accumulation, seed, version
):
    size = data_size * micro * accumulation
    split, steps = Packs(num_packs, order_version=version), -(-3 * num_packs // size)
    used = stream(split, steps, size, seed)
    for epoch in range(3):
        of_epoch = used[epoch * num_packs : (epoch + 1) * num_packs]
        assert sorted(of_epoch) == list(range(num_packs))
    # the shards of all ranks are the global batch
    plan = plan_step(split, seed=seed, global_batch_size=size, consumed_samples=size)
    shards = [shard_plan(plan, Ranks(rank, data_size), micro, padded=False) for rank in range(data_size)]
    assert all(shard.shape == (accumulation, micro) for shard in shards)
    assert sorted(np.concatenate(shards, axis=None)) == list(range(size))
    assert plan.epochs_G.tolist() == [index // num_packs for index in range(size, 2 * size)]


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 12))
def test_the_order_does_not_depend_on_the_batch_size(num_packs, one, other):
    split = Packs(num_packs)
    np.testing.assert_array_equal(stream(split, other, one), stream(split, one, other))
    # a resumed stream is the rest of the uninterrupted one
    np.testing.assert_array_equal(stream(split, other, one, start=one), stream(split, other + 1, one)[one:])


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 50))
def test_a_stream_with_an_end_is_the_same_stream_up_to_it(num_packs, data_size, micro, accumulation, end):
    split, multiple = Packs(num_packs), data_size * micro
    size, consumed, used = multiple * accumulation, 0, []
    while consumed < end:
        plan = plan_step(
            split, seed=1, global_batch_size=size, consumed_samples=consumed, end=end, batch_multiple=multiple
        )
        real = plan.packs_G[plan.packs_G >= 0]
        assert len(real) == plan.num_packs == min(size, end - consumed)
        assert len(plan.packs_G) == -(-plan.num_packs // multiple) * multiple
        assert plan.counts.tokens_K.sum() == (real + 1).sum()
        assert plan.costs_G[plan.packs_G < 0].sum() == 0
        shards = [shard_plan(plan, Ranks(rank, data_size), micro, padded=False) for rank in range(data_size)]
        assert sorted(np.concatenate(shards, axis=None)) == list(range(len(plan.packs_G)))
        used.append(real)
        consumed += plan.num_packs
    np.testing.assert_array_equal(np.concatenate(used), stream(split, 1, end))
    with pytest.raises(ValueError, match="end"):
        plan_step(split, seed=1, global_batch_size=size, consumed_samples=consumed, end=end)


def test_epochs_seeds_splits_and_data_sets_differ():
    base = stream(Packs(50), 2, 50).reshape(2, 50)
    others = [
        stream(Packs(50), 1, 50, seed=2),
        stream(Packs(50, name="valid"), 1, 50),
        stream(Packs(50, dataset_hash="other"), 1, 50),
    ]
    orders = {tuple(order) for order in (*base, *others)}
    assert len(orders) == 5
    assert tuple(range(50)) not in orders


def test_the_order_is_fixed_for_ever():
    """Golden: runs that are resumed with a newer version must go on with the same data."""
    plain, mixed = (stream(Packs(10, order_version=version), 1, 12, seed=1234) for version in (1, 2))
    assert plain.tolist() == [7, 2, 9, 0, 6, 4, 8, 5, 1, 3, 2, 3]
    assert mixed.tolist() == [7, 2, 0, 9, 5, 6, 4, 1, 3, 8, 2, 3]


def test_a_run_may_keep_another_order_than_that_of_the_data_set():
    for begun, packed in ((1, 2), (2, 1)):
        split = Packs(30, order_version=packed)
        plan = plan_step(split, seed=5, global_batch_size=30, consumed_samples=0, order_version=begun)
        assert plan.packs_G.tolist() == stream(Packs(30, order_version=begun), 1, 30, seed=5).tolist()
        assert plan.packs_G.tolist() != stream(split, 1, 30, seed=5).tolist()
    with pytest.raises(ValueError, match="order version 3"):
        stream(Packs(5, order_version=3), 1, 1)


def test_a_plan_counts_what_it_uses():
    plan = plan_step(Packs(5), seed=3, global_batch_size=12, consumed_samples=4)
    expected = [sum(p + 1 for p in plan.packs_G if p % 2 == task) for task in range(2)]
    assert plan.counts.tokens_K.tolist() == expected
    assert plan.counts.samples_K.sum() == 12


def test_a_plan_counts_what_its_rows_hold(dataset):
    split = dataset.split("train")
    plan = plan_step(split, seed=1, global_batch_size=split.num_packs + 3, consumed_samples=2)
    batch = batch_of_packs(split, plan.packs_G)
    counted = np.bincount(batch.task_ids_BS[batch.loss_mask_BS == 1], minlength=split.num_tasks)
    np.testing.assert_array_equal(plan.counts.tokens_K, counted)


@given(st.integers(1, 40), st.integers(1, 12))
def test_an_evaluation_uses_every_pack_once_in_order(num_packs, size):
    plans = list(plan_evaluation(Packs(num_packs), size))
    packs = np.concatenate([plan.packs_G for plan in plans])
    assert all(len(plan.packs_G) == size for plan in plans)
    assert packs[:num_packs].tolist() == list(range(num_packs))
    assert (packs[num_packs:] == -1).all()
    assert len(packs) - num_packs < size
    assert sum(plan.counts.samples_K.sum() for plan in plans) == num_packs


@pytest.mark.parametrize(("size", "consumed"), [(0, 0), (4, -1)])
def test_impossible_plans_are_refused(size, consumed):
    with pytest.raises(ValueError, match=r"consumed_samples.*global_batch_size"):
        plan_step(Packs(5), seed=1, global_batch_size=size, consumed_samples=consumed)


def test_plans_of_a_cached_epoch_cannot_be_spoilt():
    split = Packs(6)
    plan = plan_step(split, seed=1, global_batch_size=6, consumed_samples=0)
    before = plan.packs_G.copy()
    plan.packs_G[:] = 0
    np.testing.assert_array_equal(stream(split, 1, 6), before)
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(split, 1, 0, 2)[0] = 0


@st.composite
def plans(draw):
    """A plan with costs, sometimes with empty rows; the number of ranks, and the rows of a micro-batch."""
    data_size, micro, accumulation = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    size = data_size * micro * accumulation
    empty = draw(st.integers(0, size - 1))
    costs = draw(st.lists(st.integers(1, 4096**2), min_size=size - empty, max_size=size - empty)) + [0] * empty
    packs = draw(st.permutations(range(100, 100 + size - empty))) + [-1] * empty
    none = np.zeros(2, np.int64)
    plan = StepPlan(np.array(packs), counted(none, none), np.zeros(size, np.int64), np.array(costs))
    return plan, data_size, micro


@given(plans(), st.booleans())
def test_shards_are_a_permutation_and_of_one_size(case, padded):
    plan, data_size, micro = case
    shards = [shard_plan(plan, Ranks(rank, data_size), micro, padded) for rank in range(data_size)]
    assert len({shard.shape for shard in shards}) == 1
    assert all(shard.shape[1] == micro for shard in shards)
    assert sorted(np.concatenate(shards, axis=None)) == list(range(len(plan.packs_G)))
    for rank, shard in enumerate(shards):
        np.testing.assert_array_equal(shard, shard_plan(plan, Ranks(rank, data_size), micro, padded))
        if padded or data_size > 1:  # from the most expensive to the cheapest
            assert (np.diff(plan.costs_G[shard].ravel() if not padded else plan.costs_G[shard].max(1)) <= 0).all()


@given(plans())
def test_a_single_rank_takes_packed_rows_in_the_order_of_the_plan(case):
    plan, _, micro = case
    assert shard_plan(plan, Ranks(), micro, padded=False).ravel().tolist() == list(range(len(plan.packs_G)))


@given(plans())
def test_padded_rows_of_similar_length_share_a_micro_batch(case):
    """No arrangement in micro-batches of that size is narrower."""
    plan, data_size, micro = case
    shards = [shard_plan(plan, Ranks(rank, data_size), micro, padded=True) for rank in range(data_size)]
    narrowest = np.sort(plan.costs_G)[::-1].reshape(-1, micro)[:, 0]
    assert sorted(plan.costs_G[np.concatenate(shards)].max(1)) == sorted(narrowest)


@pytest.mark.parametrize(("data_size", "before", "after"), [(8, 1.05, 1.001), (64, 1.4, 1.02)])
def test_ranks_cost_about_the_same(data_size, before, after):
    """Packs of lognormal samples: the most expensive rank against the mean, round-robin and balanced."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(6, 1, 20_000), 1, 4096).astype(np.int32)
    samples, offsets = best_fit_decreasing(lengths, 4096)
    costs = random.permutation(np.add.reduceat(lengths[samples].astype(np.int64) ** 2, offsets[:-1]))[:512]
    none = np.zeros(1, np.int64)
    plan = StepPlan(np.arange(512), counted(none, none), np.zeros(512, np.int64), costs)
    balanced = [plan.costs_G[shard_plan(plan, Ranks(rank, data_size), 1, False)].sum() for rank in range(data_size)]
    round_robin = plan.costs_G.reshape(-1, data_size).sum(0)
    assert round_robin.max() / round_robin.mean() > before
    assert max(balanced) / np.mean(balanced) < after


def test_costs_are_those_of_the_data_set():
    """Attention of packed rows, of joined rows as one segment, and tokens of padded rows."""
    for split, expected in (
        (Packs(5), lambda p: (p + 1) ** 2 + 4),
        (Packs(5, joined=True), lambda p: (p + 3) ** 2),
        (Packs(5, padded=True), lambda p: p + 3),
    ):
        *_, last = plan_evaluation(split, 3)
        assert last.packs_G.tolist() == [3, 4, -1]
        assert last.costs_G.tolist() == [expected(3), expected(4), 0]


def test_rows_that_cannot_be_sharded_evenly_are_refused():
    plan = plan_step(Packs(5), seed=1, global_batch_size=6, consumed_samples=0)
    with pytest.raises(ValueError, match="6 rows for 2 ranks, 2 at a time"):
        shard_plan(plan, Ranks(0, 2), 2, padded=False)
