"""The account of realised shares against plain loops over the steps, with every way in which a step counts."""

import dataclasses
import types

import numpy as np
import pytest
import torch

from mft_megatron.batch import StepPlan
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.step_plan import plan_step
from mft_megatron.losses.table import LOSSES
from mft_megatron.training.shares.account import ShareAccount
from tests.losses.test_no_host_sync import NoBlockingCopies
from tests.made_dataset import write_dataset
from tests.task_counts import counted
from tests.training.shares.made_steps import reported

SIZES = (1, 3, 3, 7, 2)  # packs of steps, repeated; no multiple of any of them is the length of an epoch


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("account") / "set"
    write_dataset(prefix, 256)
    return PackedDataset.open(prefix, 256).split("train")


def plans(split, packs):
    """Plan steps of growing and shrinking size up to ``packs`` packs."""
    consumed = 0
    while consumed < packs:
        size = min(SIZES[consumed % len(SIZES)], packs - consumed)
        yield plan_step(split, seed=3, global_batch_size=size, consumed_samples=consumed)
        consumed += size


def of_global(plan, split, weights, loss):
    """Σ c_t of each task in a step, in a loop: of the tasks present, by weight."""
    counts = plan.counts.samples_K if LOSSES[loss].sample_means else plan.counts.tokens_K
    if not LOSSES[loss].weighted:
        return [count / sum(counts) for count in counts.tolist()]
    present = [weight if count else 0.0 for weight, count in zip(weights, counts, strict=True)]
    return [weight / sum(present) for weight in present]


def of_epoch(plan, split, weights, loss):
    """Σ c_t of each task in a step under epoch normalisation, in a loop."""
    name = "samples_K" if LOSSES[loss].sample_means else "tokens_K"
    totals, counts = getattr(split.totals, name), getattr(plan.counts, name)
    return [
        weight / sum(weights) * split.num_packs / plan.num_packs * count / total
        for weight, count, total in zip(weights, counts.tolist(), totals.tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    ("loss", "normalization"),
    [(loss, "global") for loss in ("token", "sample", "task-token", "task-sample")]
    + [("task-token", "epoch"), ("task-sample", "epoch")],
)
def test_shares_are_sums_over_the_steps(split, loss, normalization):
    """Weights change from step to step, one task is stopped after some steps."""
    sums_of = of_global if normalization == "global" else of_epoch
    account = ShareAccount(split, loss, normalization)
    realised, target, packs, absent, weighted = [0.0] * 4, [0.0] * 4, 0, [0] * 4, [0] * 4
    for step, plan in enumerate(plans(split, 50)):
        weights = [1.0, 2.0 + step % 3, 0.5, 3.0 if step < 9 else 0.0]
        share = sums_of(plan, split, weights, loss)
        account.count(plan, reported(share, weights))
        packs += plan.num_packs
        for task in range(4):
            realised[task] += plan.num_packs * share[task]
            target[task] += plan.num_packs * weights[task] / sum(weights)
            weighted[task] += weights[task] > 0
            absent[task] += weights[task] > 0 and plan.counts.tokens_K[task] == 0
    shares = account.read()
    np.testing.assert_allclose(shares.share_K, np.array(realised) / sum(realised), rtol=1e-13)
    if LOSSES[loss].weighted:
        np.testing.assert_allclose(shares.target_share_K, np.array(target) / packs, rtol=1e-13)
    else:
        assert shares.target_share_K is None
    assert (shares.absent_K.tolist(), shares.weighted_K.tolist()) == (absent, weighted)
    assert max(absent) > 0
    assert (shares.packs, shares.normalizations) == (50, (normalization,))
    assert shares.weights_changed == LOSSES[loss].weighted


@pytest.mark.parametrize("loss", ["task-token", "task-sample"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_with_epoch_normalisation_shares_are_exact_at_the_end_of_every_epoch(split, loss, epochs):
    account, weights = ShareAccount(split, loss, "epoch"), [1.0, 2.0, 0.5, 3.0]
    for plan in plans(split, epochs * split.num_packs):
        account.count(plan, reported(of_epoch(plan, split, weights, loss), weights))
    shares = account.read()
    np.testing.assert_allclose(shares.share_K, np.array(weights) / 6.5, rtol=1e-12)
    assert not shares.weights_changed


def test_a_task_without_training_data_has_no_target():
    without = types.SimpleNamespace(totals=counted([9, 0], [2, 0]), num_tasks=2)
    account = ShareAccount(without, "task-token", "global")
    plan = StepPlan(np.arange(4), counted([5, 0], [1, 0]), np.zeros(4, np.int64), np.ones(4, np.int64))
    account.count(plan, reported([1.0, 0.0], [1.0, 1.0]))
    shares = account.read()
    assert shares.target_share_K.tolist() == [1.0, 0.0]
    assert (shares.weighted_K.tolist(), shares.absent_K.tolist()) == ([1, 0], [0, 0])


def test_a_resumed_account_is_bit_equal(split):
    rng = np.random.default_rng(5)
    steps = [(plan, rng.random(4), rng.random(4)) for plan in plans(split, 60)]
    whole, first = (ShareAccount(split, "task-token", "global") for _ in range(2))
    for plan, share, weights in steps:
        whole.count(plan, reported(share, weights))
    for plan, share, weights in steps[:7]:
        first.count(plan, reported(share, weights))
    state = first.state()
    first.count(steps[7][0], reported(*steps[7][1:]))  # does not change the state that was taken
    again = ShareAccount(split, "task-token", "epoch")
    assert again.load(state) is None
    assert not again.read().weights_changed  # no step has been counted that could tell
    for plan, share, weights in steps[7:]:
        again.count(plan, reported(share, weights))
    expected, shares = whole.read(), again.read()
    for name in ("realised_K", "target_K", "weighted_K", "absent_K"):
        assert getattr(shares, name).tobytes() == getattr(expected, name).tobytes(), name
    assert (shares.steps, shares.packs) == (expected.steps, expected.packs)
    assert shares.normalizations == ("global", "epoch")
    assert "--mft-loss was task-token so far" in ShareAccount(split, "sample", "global").load(state)


def test_counting_does_not_wait_for_the_device(split, monkeypatch):
    """On the meta device, whose tensors have no values to read."""
    monkeypatch.setattr("mft_megatron.mcore.platform.devices.device", lambda: torch.device("meta"))
    on_meta, (plan, *_) = ShareAccount(split, "task-token", "global"), plans(split, 3)
    report = reported(np.ones(4), np.ones(4))
    report = dataclasses.replace(report, share_K=report.share_K.to("meta"))
    with NoBlockingCopies():
        on_meta.count(plan, report)
    assert on_meta.steps == 1


def test_before_the_first_step_there_are_no_shares(split):
    shares = ShareAccount(split, "task-token", "global").read()
    assert (shares.share_K, shares.target_share_K, shares.steps) == (None, None, 0)
