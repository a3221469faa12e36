"""The digest of an epoch: the same for any data-parallel size and after any resume, another one if a row is lost."""

import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_megatron.batch import Ranks
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.micro_batches import UsageByEpoch
from mft_megatron.data.loading.step_plan import plan_step, shard_plan
from mft_megatron.data.loading.usage import Usage, hash64, planned_usage
from mft_megatron.data.sample_slices import NO_SLICES, SampleSlices, concatenate_slices
from tests.made_dataset import write_dataset

TASKS = 3


class Split:
    """Packs of one to three slices; each sample is cut into two slices; sample s belongs to task s % 3."""

    def __init__(self, num_packs, padded=False):
        sizes = np.arange(num_packs) % 3 + 1
        self.num_packs, self.name, self.num_tasks = num_packs, "train", TASKS
        self._offsets = np.concatenate([[0], np.cumsum(sizes)])
        indices = np.arange(self._offsets[-1])
        self._slices = SampleSlices(indices // 2, indices % 2 * 7, np.full(len(indices), 7))
        self.num_slices = len(indices)
        task_ids = (np.arange(num_packs * 3) % TASKS).astype(np.uint16)
        entry = types.SimpleNamespace(order_version=2)
        self.dataset = types.SimpleNamespace(
            dataset_hash="h", joined=False, padded=padded, task_ids=task_ids, entry=entry
        )
        self.rarest_tasks = np.zeros(num_packs, np.int32)

    def slices(self, indices):
        return self._slices.take(indices)

    def slices_of(self, pack):
        return self.slices(slice(self._offsets[pack], self._offsets[pack + 1]))

    def slices_of_packs(self, packs):
        rows = [self.slices_of(pack) for pack in packs]
        return concatenate_slices(rows), np.array([len(row.samples) for row in rows])

    def counts(self, packs_G):
        return np.zeros(TASKS, np.int64), np.zeros(TASKS, np.int64)


def consume(split, usages, consumed, size, micro, spoil=None):
    """Consume one step, with a rank for each of ``usages``."""
    plan = plan_step(split, seed=3, global_batch_size=size, consumed_samples=consumed)
    for rank, usage in enumerate(usages):
        indices = shard_plan(plan, Ranks(rank, len(usages)), micro, split.dataset.padded).ravel()
        rows = [split.slices_of(pack) for pack in plan.packs_G[indices]]
        usage.add(spoil(rows) if spoil else rows, plan.epochs_G[indices], split.dataset.task_ids)


def summed(usages, epoch):
    return sum((usage.of(epoch) for usage in usages), Usage.none(TASKS))


def by_the_book(split):
    """Uses and digests of each task, computed with Python's integers."""
    slices, digests = [0] * TASKS, [0] * TASKS
    for sample, start in zip(split._slices.samples.tolist(), split._slices.starts.tolist(), strict=True):
        x = ((sample << 32 | start) + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        slices[sample % TASKS] += 1
        digests[sample % TASKS] = (digests[sample % TASKS] + (x ^ x >> 31)) % 2**64
    return slices, digests


@given(st.integers(1, 40))
def test_the_plan_is_the_sum_over_the_index(num_packs):
    split = Split(num_packs)
    planned = planned_usage(split)
    assert (planned.slices_K.tolist(), planned.digest_K.tolist()) == by_the_book(split)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 30),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3),
    st.integers(0, 2),
    st.booleans(),
)
def test_every_epoch_is_used_as_planned_for_any_sizes_and_after_any_resume(num_packs, sizes_of_runs, steps, padded):
    """Each run resumes from the sums of the run before, with other sizes; the last one completes the second epoch."""
    split = Split(num_packs, padded)
    planned, before, consumed = planned_usage(split), {0: Usage.none(TASKS), 1: Usage.none(TASKS)}, 0
    for number, (data_size, micro, accumulation) in enumerate(sizes_of_runs):
        usages, size = [UsageByEpoch(TASKS) for _ in range(data_size)], data_size * micro * accumulation
        taken = 0
        while consumed < 2 * num_packs and (taken < steps or number == len(sizes_of_runs) - 1):
            consume(split, usages, consumed, size, micro)
            consumed, taken = consumed + size, taken + 1
        before = {epoch: used + summed(usages, epoch) for epoch, used in before.items()}
    for used in before.values():
        assert used.slices_K.tolist() == planned.slices_K.tolist()
        assert used.digest_K.tolist() == planned.digest_K.tolist()
        assert not used.differs_from(planned).any()


FAULTS = {
    "a row is lost": lambda rows: rows[1:],
    "a row is doubled": lambda rows: [rows[1], *rows[1:]],
    "a slice is lost": lambda rows: [rows[0].take(slice(1, None)), *rows[1:]],
    "a window is taken for another": lambda rows: [rows[0]._replace(starts=7 - rows[0].starts), *rows[1:]],
}


@settings(deadline=None)
@given(st.integers(8, 40), st.integers(1, 4), st.sampled_from(sorted(FAULTS)))
def test_faults_are_detected(num_packs, data_size, fault):
    split, spoilt = Split(num_packs), []

    def spoil(rows):
        if spoilt or (fault == "a row is doubled" and same(rows[0], rows[1])):
            return rows
        spoilt.append(True)
        wrong = FAULTS[fault](rows)
        return wrong + [NO_SLICES] * (len(rows) - len(wrong))

    usages = [UsageByEpoch(TASKS) for _ in range(data_size)]
    for consumed in range(0, num_packs, 2 * data_size):
        consume(split, usages, consumed, 2 * data_size, 2, spoil)
    assert spoilt
    assert summed(usages, 0).differs_from(planned_usage(split)).any()


def same(one, other):
    return np.array_equal(one.samples, other.samples) and np.array_equal(one.starts, other.starts)


def test_tasks_are_compared_separately():
    one = Usage(np.array([2, 2]), np.array([5, 6], np.uint64))
    other = Usage(np.array([2, 2]), np.array([5, 7], np.uint64))
    assert one.differs_from(other).tolist() == [False, True]
    assert one.differs_from(Usage(np.array([1, 2]), one.digest_K)).tolist() == [True, False]


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**31 - 1)), unique=True, max_size=50))
def test_hashes_of_different_slices_differ(slices):
    samples, starts = np.array(slices, np.int64).reshape(-1, 2).T
    assert len(set(hash64(samples, starts).tolist())) == len(slices)


def test_hashes_are_fixed_for_ever():
    """Golden: a run resumed with a newer version adds to the sums of the older. The first value is SplitMix64's."""
    assert hash64(np.array([0, 1]), np.array([0, 5])).tolist() == [0xE220A8397B1DCDAF, 0x51307108AD417EEA]


@pytest.mark.parametrize("mode", ["pack", "padding", "concat"])
def test_of_a_data_set_on_disk(tmp_path, mode):
    """Windows, repeated samples and joined documents: planned usage equals the sum over all packs."""
    options = {} if mode == "concat" else {"overlong": "split", "task_sampling": {"write": 2.0, "read": 0.5}}
    write_dataset(tmp_path / "set", 64, longest=500, documents=mode == "concat", padding_mode=mode, **options)
    split = PackedDataset.open(tmp_path / "set", 64).split("train")
    planned, usage = planned_usage(split), UsageByEpoch(split.num_tasks)
    rows = [split.slices_of(pack) for pack in range(split.num_packs)]
    usage.add(rows, np.zeros(len(rows), np.int64), split.dataset.task_ids)
    assert not usage.of(0).differs_from(planned).any()
    assert planned.slices_K.sum() == split.dataset.entry.packs["train"].samples == split.num_slices
    usage.forget(0)
    assert not usage.of(0).slices_K.any()
