"""Every loss against docs/LOSSES.md in numpy, against finite differences, and against itself cut differently."""

import dataclasses

import numpy as np
import pytest
import torch

from mft_megatron.loss_names import FOCAL, LOSSES
from mft_megatron.losses.focal import TaskStatistics
from mft_megatron.losses.objective import SUMS, Objective
from tests.batches import as_batch, by_sample, counted, random_batch
from tests.reference import reference_focal_surrogate, reference_loss

WEIGHTS = (0.5, 3.0, 1.25, 2.0)


def step(objective, batch, loss, before=None, num_micro_batches=1):
    """Value, gradient by token, sums, factors and ``M_i`` of a step with one micro-batch; the losses in fp64."""
    arrays, weights = batch, torch.tensor(WEIGHTS, dtype=torch.float64)
    micro_batch = as_batch(*arrays)
    losses = torch.from_numpy(loss).double().requires_grad_()
    tokens_K, samples_K = counted(by_sample(*arrays, loss), 4)
    before = before or TaskStatistics.none(4)
    factors = objective.before_step(tokens_K, samples_K, weights, before, num_micro_batches)
    value, coefficient = objective.contribution(factors, micro_batch, losses)
    (gradient,) = torch.autograd.grad(value, losses)
    return value.item(), gradient.numpy(), objective.sums(micro_batch, losses, coefficient, 4), factors, samples_K


def statistics(samples, unseen=()):
    """Eq. 3's ``1 - P_i`` and ``Q_i`` of every task that occurs, except ``unseen`` ones."""
    miss, mean, seen = np.zeros(4), np.zeros(4), np.zeros(4)
    for task in {task for task, tokens in samples if len(tokens)} - set(unseen):
        losses = [tokens.astype(np.float64) for other, tokens in samples if other == task and len(tokens)]
        miss[task] = 1 - np.mean([np.exp(-tokens).mean() for tokens in losses])
        mean[task] = np.mean([tokens.mean() for tokens in losses])
        seen[task] = 1
    return TaskStatistics(*map(torch.from_numpy, (miss, mean, seen)))


@pytest.mark.parametrize("mode", LOSSES)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("seed", range(3))
def test_the_reported_loss_is_the_reference(mode, gamma, seed):
    *batch, loss = random_batch(seed)
    objective = Objective(mode, gamma)
    _, _, sums, factors, samples_K = step(objective, batch, loss)
    reported = objective.by_task(factors, sums, samples_K).sum().item()
    assert reported == pytest.approx(reference_loss(mode, by_sample(*batch, loss), WEIGHTS, gamma), rel=1e-12)


@pytest.mark.parametrize("mode", LOSSES[:5])
def test_what_is_differentiated_is_what_is_reported(mode):
    """Except in focal-task, whose surrogate has another value; its gradient is tested below."""
    *batch, loss = random_batch(1)
    objective = Objective(mode)
    value, _, sums, factors, samples_K = step(objective, batch, loss)
    assert value == pytest.approx(objective.by_task(factors, sums, samples_K).sum().item(), rel=1e-12)


SLOPES = [Objective(mode, gamma, detach) for mode in LOSSES for gamma in (0.5, 2.0) for detach in (False, True)]
SLOPES += [Objective(mode, per_micro_batch=True) for mode in LOSSES if mode not in FOCAL]


@pytest.mark.parametrize("objective", SLOPES, ids=str)
def test_the_slope_known_beforehand_is_the_gradient(objective):
    """For all tokens and for some of them, and for the objective times a factor; focal-sample alone has no slope."""
    *batch, loss = random_batch(3)
    before = statistics(by_sample(*random_batch(4)), unseen={1})
    _, gradient, _, factors, _ = step(objective, batch, loss, before, num_micro_batches=3)
    slope = objective.slope(factors, as_batch(*batch))
    assert (slope is None) == (objective.mode == "focal-sample")
    if slope is not None:
        assert (slope.exponential is not None) == (objective.mode == "focal-task")
        supervised = np.flatnonzero(batch[2])
        found = (
            slope.take(torch.from_numpy(supervised)).times(3.0).at(torch.from_numpy(loss.ravel()[supervised]).double())
        )
        np.testing.assert_allclose(found.numpy(), 3 * gradient.ravel()[supervised], rtol=1e-13)
        assert not gradient.ravel()[np.flatnonzero(batch[2] == 0)].any()


def numerical_gradient(mode, batch, loss, gamma):
    """Central differences of the reference loss, in every supervised token."""
    _, _, mask = batch
    loss = loss.astype(np.float64)
    gradient = np.zeros_like(loss)
    for index in zip(*np.nonzero(mask), strict=True):
        ends = []
        for move in (1e-5, -1e-5):
            moved = loss.copy()
            moved[index] += move
            ends.append(reference_loss(mode, by_sample(*batch, moved), WEIGHTS, gamma))
        gradient[index] = (ends[0] - ends[1]) / 2e-5
    return gradient


@pytest.mark.parametrize("mode", LOSSES)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.5])
def test_gradients_are_finite_differences(mode, gamma):
    """For focal-task, given the statistics of the step itself as those before: then its gradient is that of Eq. 3."""
    *batch, loss = random_batch(2, rows=3, width=24)
    before = statistics(by_sample(*batch, loss))
    _, gradient, *_ = step(Objective(mode, gamma), batch, loss, before)
    expected = numerical_gradient(mode, batch, loss, gamma)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)
    assert (gradient[batch[2] == 0] == 0).all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("first_time", [(), (1,), (0, 1, 2)])
def test_focal_task_is_differentiated_at_the_statistics_before(gamma, detach, first_time):
    *batch, loss = random_batch(3)
    before = statistics(by_sample(*batch[:3], random_batch(9)[3]), first_time)
    _, gradient, *_ = step(Objective("focal-task", gamma, detach), batch, loss, before)
    known = {
        task: (1 - before.miss_K[task].item(), before.loss_K[task].item()) for task in range(4) if before.seen_K[task]
    }
    samples = by_sample(*batch, loss)
    expected = reference_focal_surrogate(samples, WEIGHTS, gamma, detach, known)
    sample_ids, _, mask = batch
    for sample, slopes in enumerate(expected):
        np.testing.assert_allclose(gradient[(sample_ids == sample) & (mask == 1)], slopes, rtol=1e-12)


def test_focal_sample_without_the_modulating_factors_gradient():
    """Detached, the gradient is the coefficient alone; the value stays the same."""
    *batch, loss = random_batch(4)
    value, gradient, *_ = step(Objective("focal-sample", 2.0), batch, loss)
    same, detached, sums, *_ = step(Objective("focal-sample", 2.0, detach=True), batch, loss)
    assert same == value
    assert not np.allclose(gradient, detached)
    linear = (detached * loss.astype(np.float64)).sum()
    assert linear == pytest.approx(value, rel=1e-12)
    assert sums[SUMS.index("share_K")].sum().item() == pytest.approx(detached.sum(), rel=1e-12)


@pytest.mark.parametrize("mode", FOCAL)
def test_gamma_0_is_the_linear_counterpart(mode):
    """(1/|P|) Σ alpha_i Q_i: with equal alphas task-sample with equal weights."""
    *batch, loss = random_batch(5)
    before = statistics(by_sample(*batch, loss))
    micro_batch, losses = as_batch(*batch), torch.from_numpy(loss).double().requires_grad_()
    counts = counted(by_sample(*batch, loss), 4)
    gradients = []
    for objective in (Objective(mode, 0.0), Objective("task-sample")):
        factors = objective.before_step(*counts, torch.ones(4), before)
        value, coefficient = objective.contribution(factors, micro_batch, losses)
        gradients += torch.autograd.grad(value, losses)
        gradients.append(coefficient)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-14, atol=0)


@pytest.mark.parametrize("mode", LOSSES)
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_does_not_depend_on_how_the_batch_is_cut(mode, gamma):
    """Micro-batches of one row, in any order, add up to the whole: values, gradients and sums."""
    sample_ids, task_ids, mask, loss = random_batch(6)
    before = statistics(by_sample(sample_ids, task_ids, mask, random_batch(8)[3]))
    objective = Objective(mode, gamma)
    value, gradient, sums, factors, _ = step(objective, (sample_ids, task_ids, mask), loss, before)
    total, total_sums = 0.0, torch.zeros_like(sums)
    for row in reversed(range(len(mask))):
        arrays = (sample_ids[row : row + 1] - sample_ids[row].min(), task_ids[row : row + 1], mask[row : row + 1])
        losses = torch.from_numpy(loss[row : row + 1]).double().requires_grad_()
        part, coefficient = objective.contribution(factors, as_batch(*arrays), losses)
        total += part.item()
        total_sums += objective.sums(as_batch(*arrays), losses, coefficient, 4)
        np.testing.assert_array_equal(torch.autograd.grad(part, losses)[0].numpy()[0], gradient[row])
    assert total == pytest.approx(value, rel=1e-13)
    torch.testing.assert_close(total_sums, sums, rtol=1e-13, atol=1e-18)


@pytest.mark.parametrize("mode", LOSSES[:4])
def test_micro_batch_normalisation_is_the_mean_of_micro_batches(mode):
    """MFTCoder's: each micro-batch by its own counts, then the mean; it depends on how the batch is cut."""
    sample_ids, task_ids, mask, loss = random_batch(6)
    objective = Objective(mode, per_micro_batch=True)
    *_, factors, _ = step(objective, (sample_ids, task_ids, mask), loss, num_micro_batches=len(mask))
    total, expected = 0.0, []
    for row in range(len(mask)):
        arrays = (sample_ids[row : row + 1] - sample_ids[row].min(), task_ids[row : row + 1], mask[row : row + 1])
        part, _ = objective.contribution(factors, as_batch(*arrays), torch.from_numpy(loss[row : row + 1]).double())
        total += part.item()
        expected.append(reference_loss(mode, by_sample(*arrays, loss[row : row + 1]), WEIGHTS))
    assert total == pytest.approx(np.mean(expected), rel=1e-12)
    assert total != pytest.approx(reference_loss(mode, by_sample(sample_ids, task_ids, mask, loss), WEIGHTS), rel=1e-3)


@pytest.mark.parametrize("mode", LOSSES[:4])
def test_micro_batch_normalisation_counts_rows_that_are_not_empty(mode):
    """Three packs in micro-batches of two rows: the second has an empty row, and they count 2/3 and 1/3."""
    objective, weights = Objective(mode, per_micro_batch=True), torch.tensor(WEIGHTS, dtype=torch.float64)
    ones_K = torch.ones(4)
    factors = objective.before_step(ones_K, ones_K, weights, TaskStatistics.none(4), num_micro_batches=3 / 2)
    total, expected = 0.0, []
    for seed, rows in ((6, 2), (7, 1)):
        *arrays, loss = random_batch(seed, rows=rows)
        expected += [reference_loss(mode, by_sample(*arrays, loss), WEIGHTS)] * rows
        empty = ((0, 2 - rows), (0, 0))
        batch = as_batch(*(np.pad(array, empty) for array in arrays))
        batch = dataclasses.replace(batch, lengths_B=torch.tensor([40] * rows + [0] * (2 - rows)))
        total += objective.contribution(factors, batch, torch.from_numpy(np.pad(loss, empty)).double())[0].item()
    assert total == pytest.approx(np.mean(expected), rel=1e-12)


@pytest.mark.parametrize("mode", FOCAL)
@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0, 2.0])
@pytest.mark.parametrize("level", [0.0, 1e-30, 1e-8, 60.0, 1e4])
def test_focal_losses_stay_finite(mode, gamma, level):
    """A model that is sure of everything, or of nothing, still has a finite value and gradient."""
    *batch, loss = random_batch(7)
    loss = np.full_like(loss, level)
    before = statistics(by_sample(*batch, loss))
    value, gradient, sums, factors, samples_K = step(Objective(mode, gamma), batch, loss, before)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert Objective(mode, gamma).by_task(factors, sums, samples_K).isfinite().all()


def test_a_small_miss_is_not_lost_to_rounding():
    """1 - exp(-l) of l = 1e-9 would be 0 in fp32 and off by 1e-8 in fp64."""
    *batch, loss = random_batch(7)
    _, gradient, *_ = step(Objective("focal-sample", 1.0), batch, np.full(loss.shape, 1e-9))
    tokens = gradient[batch[2] == 1]
    expected = step(Objective("task-sample"), batch, loss)[1]
    present = sum(WEIGHTS[:3]) / 3  # Eq. 2 divides by the number of tasks, Eq. 1 by the sum of the weights
    np.testing.assert_allclose(tokens, 2e-9 * present * expected[batch[2] == 1], rtol=1e-8)


def test_tasks_keep_their_statistics_until_they_appear_again():
    before = TaskStatistics.none(3)
    once = before.after(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([4.0, 2.0, 0.0]), torch.tensor([2, 1, 0]))
    assert (once.miss_K.tolist(), once.loss_K.tolist(), once.seen_K.tolist()) == ([0.5, 0.5, 0], [2, 2, 0], [1, 1, 0])
    twice = once.after(torch.tensor([0.0, 0.25, 0.5]), torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0, 1, 1]))
    assert (twice.miss_K.tolist(), twice.loss_K.tolist()) == ([0.5, 0.25, 0.5], [2, 1, 3])
    assert twice.seen_K.tolist() == [1, 1, 1]
    assert before.seen_K.tolist() == [0, 0, 0]


def test_fp32_losses_give_fp32_gradients():
    *batch, loss = random_batch(1)
    micro_batch, losses = as_batch(*batch), torch.from_numpy(loss).requires_grad_()
    for mode in LOSSES:
        objective = Objective(mode)
        factors = objective.before_step(*counted(by_sample(*batch, loss), 4), torch.ones(4), TaskStatistics.none(4))
        value, coefficient = objective.contribution(factors, micro_batch, losses)
        assert value.dtype == torch.float32
        assert not coefficient.requires_grad
        assert torch.autograd.grad(value, losses)[0].dtype == torch.float32
