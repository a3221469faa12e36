"""Micro-batches of a rank: the rows that the plan gives it, no wider than necessary, and counted when they are used."""

import itertools

import numpy as np
import pytest

from mft_megatron.batch import Ranks
from mft_megatron.data.loading.build_batch import build_batch
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.micro_batches import MicroBatches, UsageByEpoch
from mft_megatron.data.loading.step_plan import plan_step, shard_plan
from mft_megatron.data.loading.usage import planned_usage
from mft_megatron.data.loading.validation_sampling import shard_rows
from tests.made_dataset import batch_of_packs, write_dataset

MULTIPLE = 16


@pytest.fixture(scope="module", params=["pack", "padding"])
def split(request, tmp_path_factory):
    prefix = tmp_path_factory.mktemp("set") / "set"
    write_dataset(prefix, 128, longest=120, padding_mode=request.param, split=(80, 20, 0))
    return PackedDataset.open(prefix, 128).split("train")


def plan_of(split, size=8, step=0):
    return plan_step(split, seed=1, global_batch_size=size, consumed_samples=step * size)


def assert_same(ours, theirs):
    for name, values in vars(theirs).items():
        np.testing.assert_array_equal(getattr(ours, name), values, err_msg=name)


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_are_those_of_the_plan(split, rank):
    plan, ranks, padded = plan_of(split), Ranks(rank, 2), split.dataset.padded
    micro_batches = MicroBatches.of_plan(split, plan, ranks, 2, MULTIPLE)
    assert (len(micro_batches), micro_batches.padded) == (2, padded)
    packs = plan.packs_G[shard_plan(plan, ranks, 2, padded)]
    for batch, packs_B in zip(micro_batches, packs, strict=True):
        longest = max(split.num_tokens([pack]) for pack in packs_B)
        width = min(-(-longest // MULTIPLE) * MULTIPLE, 128) if padded else 128
        assert_same(batch, build_batch(split.dataset, [split.slices_of(pack) for pack in packs_B], width))


def test_micro_batches_without_a_token_have_the_least_width(split):
    rows = [split.slices_of(0)]
    batches = list(MicroBatches.of_draw(split.dataset, rows, Ranks(1, 2), 1, 2, MULTIPLE))
    assert [batch.tokens_BS.shape for batch in batches] == [(1, MULTIPLE if split.dataset.padded else 128)]
    assert not batches[0].loss_mask_BS.any()


def test_rows_of_a_draw_are_those_of_the_rank(split):
    rows = [split.slices_of(pack) for pack in range(5)]
    batches = list(MicroBatches.of_draw(split.dataset, rows, Ranks(0, 2), 1, 4, 128))
    expected = shard_rows(rows, Ranks(0, 2), 1, 4)
    for batch, micro_batch in zip(batches, expected, strict=True):
        width = batch.tokens_BS.shape[1]
        assert_same(batch, build_batch(split.dataset, micro_batch, width))
    assert_same(batches[0], batch_of_packs(split, [0]))


def usage_of(split, *micro_batches):
    usage = UsageByEpoch(split.num_tasks)
    for own in micro_batches:
        own.add_used_to(usage)
    return usage.of(0).slices_K


def test_what_was_iterated_over_is_used(split):
    """A pipeline with several chunks of the model iterates over the same micro-batches once for each chunk."""
    micro_batches = MicroBatches.of_plan(split, plan_of(split), Ranks(), 2, MULTIPLE)
    assert micro_batches.num_used == 0
    assert not usage_of(split, micro_batches).any()
    one, other = itertools.tee(iter(micro_batches))
    first, second = next(one), next(one)
    assert next(other) is first
    assert micro_batches.num_used == 2
    tasks = [batch.task_ids_BS.ravel()[batch.cu_seqlens[:-1]] for batch in (first, second)]
    real = [batch.tokens_BS.ravel()[batch.cu_seqlens[:-1]] != split.dataset.pad_token_id for batch in (first, second)]
    counted = sum(np.bincount(t[r], minlength=split.num_tasks) for t, r in zip(tasks, real, strict=True))
    assert usage_of(split, micro_batches).tolist() == counted.tolist()
    assert len([*other, *one]) == 3 + 2
    assert micro_batches.num_used == 4


@pytest.mark.parametrize("skipped", [False, True])
def test_an_epoch_of_steps_uses_all_slices(split, skipped):
    usage, steps = UsageByEpoch(split.num_tasks), -(-split.num_packs // 8)
    for step, rank in itertools.product(range(steps), range(2)):
        micro_batches = MicroBatches.of_plan(split, plan_of(split, step=step), Ranks(rank, 2), 1, MULTIPLE)
        micro_batches.skip() if skipped else list(micro_batches)
        micro_batches.add_used_to(usage)
    assert not usage.of(0).differs_from(planned_usage(split)).any()
