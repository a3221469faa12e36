"""``--mft-normalization epoch``: over an epoch every task has exactly its weight, whatever the steps are."""

import numpy as np
import pytest
import torch

from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.step_plan import plan_step
from mft_megatron.loss_names import FOCAL, LOSSES, WEIGHTED
from mft_megatron.losses.focal import TaskStatistics
from mft_megatron.losses.objective import SUMS, Objective
from tests.batches import as_batch, random_batch, random_weights, weighed, weighted_samples
from tests.made_dataset import write_dataset
from tests.reference import reference_epoch_loss, reference_weighted_loss

LINEAR = [mode for mode in LOSSES if mode not in FOCAL]
# the fourth task has no data in random batches, and the second no weight
WEIGHTS = (0.5, 0.0, 1.25, 2.0)


class Epoch:
    """An epoch of random packs, one row each, that steps of any size consume."""

    def __init__(self, seed, packs=40, weighted=True):
        *arrays, self.loss = random_batch(seed, rows=packs)
        self.arrays = (*arrays, *random_weights(seed, arrays[0], arrays[2], weighted, weighted))
        self.samples = self.samples_of(range(packs))
        self.packs = packs

    def rows(self, packs):
        """Arrays and losses of some packs."""
        packs = list(packs)
        rows = [None if array is None else array[packs].copy() for array in self.arrays]
        _, rows[0] = np.unique(rows[0], return_inverse=True)
        rows[0] = rows[0].reshape(rows[1].shape)
        return rows, self.loss[packs]

    def samples_of(self, packs):
        arrays, loss = self.rows(packs)
        return weighted_samples(*arrays[:3], loss, *arrays[3:])

    def factors(self, objective, packs, weights=WEIGHTS):
        return objective.before_step(
            *weighed(self.samples, 4),
            torch.tensor(weights, dtype=torch.float64),
            TaskStatistics.none(4),
            num_batches=self.packs / packs,
        )

    def step(self, mode, packs, weights=WEIGHTS):
        """Value and sums by task of a step that consumes some packs."""
        objective, (arrays, loss) = Objective(mode), self.rows(packs)
        batch, losses = as_batch(*arrays), torch.from_numpy(loss).double()
        value, coefficient = objective.contribution(self.factors(objective, len(packs), weights), batch, losses)
        return value.item(), dict(zip(SUMS, objective.sums(batch, losses, coefficient, 4).numpy(), strict=True))


def sizes_of_steps(seed, packs):
    """Sizes of global batches that ramp up, at random, and whose last is smaller."""
    rng, sizes = np.random.default_rng(seed), []
    while sum(sizes) < packs:
        sizes.append(min(len(sizes) + int(rng.integers(1, 9)), packs - sum(sizes)))
    return sizes


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", LINEAR)
def test_a_step_is_the_reference(mode, weighted):
    epoch = Epoch(1, weighted=weighted)
    for packs in ([3], [0, 7, 8, 9], list(range(40))):
        value, _ = epoch.step(mode, packs)
        arguments = (epoch.samples_of(packs), epoch.samples, WEIGHTS, len(packs), epoch.packs)
        assert value == pytest.approx(reference_epoch_loss(mode, *arguments), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", LINEAR)
def test_the_steps_of_an_epoch_add_up_to_the_objective_over_it(mode, seed):
    """Σ c_t·G/P of a task is w_i/W, and Σ c_t·l_t·G/P the loss of the epoch as one batch, in any order and sizes."""
    epoch, value, share_K, start = Epoch(seed), 0.0, np.zeros(4), 0
    order = np.random.default_rng(seed).permutation(epoch.packs)
    for size in sizes_of_steps(seed, epoch.packs):
        of_step, sums = epoch.step(mode, order[start : start + size])
        value += of_step * size / epoch.packs
        share_K += sums["share_K"] * size / epoch.packs
        start += size
    assert value == pytest.approx(reference_weighted_loss(mode, epoch.samples, WEIGHTS), rel=1e-12)
    assert share_K.sum() == pytest.approx(1, rel=1e-12)
    if mode in WEIGHTED:
        np.testing.assert_allclose(share_K, np.array([0.5, 0, 1.25, 0]) / 1.75, rtol=1e-12)


@pytest.mark.parametrize("mode", LINEAR)
def test_every_token_of_a_task_counts_alike(mode):
    """Or, by samples, every sample: in whichever step it is. With ``global`` they do not."""
    epoch = Epoch(2, weighted=False)

    def factors(objective, packs):
        counts = weighed(epoch.samples_of(packs), 4)
        return objective.before_step(*counts, torch.tensor(WEIGHTS).double(), TaskStatistics.none(4))

    steps = [range(start, start + 4) for start in range(0, 40, 4)]
    of_epoch = torch.stack([epoch.factors(Objective(mode), len(packs)).base_K for packs in steps])
    of_step = torch.stack([factors(Objective(mode), packs).base_K for packs in steps])
    assert (of_epoch == of_epoch[0]).all()
    assert (of_step.amax(0) > 1.05 * of_step.amin(0))[0]


@pytest.mark.parametrize("mode", LINEAR)
def test_an_epoch_of_one_step_is_global(mode):
    epoch = Epoch(3)
    value, sums = epoch.step(mode, range(epoch.packs))
    objective, (arrays, loss) = Objective(mode), epoch.rows(range(epoch.packs))
    weight_K = torch.tensor(WEIGHTS, dtype=torch.float64)
    factors = objective.before_step(*weighed(epoch.samples, 4), weight_K, TaskStatistics.none(4))
    losses = torch.from_numpy(loss).double()
    same, coefficient = objective.contribution(factors, as_batch(*arrays), losses)
    assert value == pytest.approx(same.item(), rel=1e-12)
    theirs = objective.sums(as_batch(*arrays), losses, coefficient, 4)
    np.testing.assert_allclose(np.array(list(sums.values())), theirs.numpy(), rtol=1e-12)


@pytest.mark.parametrize("mode", WEIGHTED)
def test_weights_that_change_count_from_the_step_on_that_they_change_at(mode):
    """A balancer's, and the 0 of a task that is stopped: the others then share its part."""
    epoch, changed = Epoch(4), (0.5, 0.0, 0.0, 2.0)
    _, before = epoch.step(mode, range(10), WEIGHTS)
    _, after = epoch.step(mode, range(10), changed)
    np.testing.assert_allclose(after["share_K"][0], before["share_K"][0] * (0.5 + 1.25) / 0.5, rtol=1e-12)
    assert after["share_K"][2] == 0 < before["share_K"][2]


def test_a_step_without_a_token_of_a_weighted_task_is_known():
    """Its coefficients are not all 0, unlike those of ``global``: the counts of the batch decide."""
    tokens_K, samples_K = torch.tensor([0.0, 3.0]), torch.tensor([0.0, 1.0])
    for mode in LOSSES:
        objective = Objective(mode)
        assert objective.supervises(tokens_K, samples_K, torch.tensor([0.0, 1.0]))
        assert objective.supervises(tokens_K, samples_K, torch.tensor([1.0, 0.0])) == (mode in ("token", "sample"))
        assert not objective.supervises(torch.zeros(2), torch.zeros(2), torch.ones(2))


KINDS = {
    "packed": {},
    "repeated": {"task_sampling": {"completion": 0.5, "read": 2.6}},
    "weighted": {"weighted": "samples turns"},
    "padded": {"padding_mode": "padding"},
    "joined": {"padding_mode": "concat", "documents": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_real_plans_add_up(tmp_path, kind):
    """With a ramp-up, over two epochs of which steps share the border: plans of a data set."""
    write_dataset(tmp_path / "set", 128, longest=120, split=(60, 40, 0), **KINDS[kind])
    split = PackedDataset.open(tmp_path / "set", 128).split("train")
    weight_K = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    for mode in WEIGHTED:
        share_K, consumed, end = torch.zeros(4, dtype=torch.float64), 0, 2 * split.num_packs
        counts = 1 if mode == "task-sample" else 0
        while consumed < end:
            size = min(3 + consumed // 4, 8)
            plan = plan_step(
                split, seed=1, global_batch_size=size, consumed_samples=consumed, end=end, batch_multiple=2
            )
            whole = map(torch.from_numpy, split.totals[2:])
            num_batches = split.num_packs / plan.num_packs
            factors = Objective(mode).before_step(*whole, weight_K, TaskStatistics.none(4), num_batches=num_batches)
            share_K += factors.base_K * torch.from_numpy(plan.counts[2:][counts]) / num_batches
            consumed += plan.num_packs
        torch.testing.assert_close(share_K, 2 * weight_K / weight_K.sum(), rtol=1e-12, atol=0)
