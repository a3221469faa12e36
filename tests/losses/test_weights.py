"""Weights of samples and turns in every loss, against Python's floats, finite differences and repeated samples."""

import dataclasses

import numpy as np
import pytest
import torch

from mft_megatron.loss_names import FOCAL, LOSSES
from mft_megatron.losses.focal import TaskStatistics
from mft_megatron.losses.objective import SUMS, Objective
from mft_megatron.losses.supervision import Supervision
from tests.batches import as_batch, random_batch, random_weights, weighed, weighted_samples
from tests.reference import reference_loss, reference_weighted_loss

WEIGHTS = (0.5, 3.0, 1.25, 2.0)
LINEAR = [mode for mode in LOSSES if mode not in FOCAL]
# which of the two weights a micro-batch has: of samples, of turns
KINDS = [(True, True), (True, False), (False, True)]


def made(seed, samples=True, turns=True, **size):
    """Arrays of a micro-batch, its token losses, and its samples as the reference takes them."""
    *arrays, loss = random_batch(seed, **size)
    weights = random_weights(seed, arrays[0], arrays[2], samples, turns)
    return (*arrays, *weights), loss, weighted_samples(*arrays, loss, *weights)


def step(objective, arrays, loss, samples, before=None, num_micro_batches=1):
    """Value, gradient by token, sums and reported loss of a step with one micro-batch; the losses in fp64."""
    losses = torch.from_numpy(loss).double().requires_grad_()
    tokens_K, samples_K = weighed(samples, 4)
    weight_K, before = torch.tensor(WEIGHTS, dtype=torch.float64), before or TaskStatistics.none(4)
    factors = objective.before_step(tokens_K, samples_K, weight_K, before, num_micro_batches)
    batch = as_batch(*arrays)
    value, coefficient = objective.contribution(factors, batch, losses)
    (gradient,) = torch.autograd.grad(value, losses)
    sums = objective.sums(batch, losses, coefficient, 4)
    return value.item(), gradient.numpy(), sums, objective.by_task(factors, sums, samples_K).sum().item()


def statistics(samples):
    """Eq. 3's ``1 - P_i`` and ``Q_i`` of every task that occurs, weighted."""
    miss, mean, seen = np.zeros(4), np.zeros(4), np.zeros(4)
    for task in {task for task, tokens, *_ in samples if tokens}:
        here = [
            (np.average(1 - np.exp(-np.array(tokens)), weights=turns), np.average(tokens, weights=turns), of_sample)
            for other, tokens, turns, of_sample in samples
            if other == task and tokens
        ]
        *means, of_samples = np.array(here).T
        miss[task], mean[task] = (np.average(values, weights=of_samples) for values in means)
        seen[task] = 1
    return TaskStatistics(*map(torch.from_numpy, (miss, mean, seen)))


@pytest.mark.parametrize("mode", LOSSES)
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_reported_loss_is_the_reference(mode, kinds, gamma):
    arrays, loss, samples = made(3, *kinds)
    value, _, _, reported = step(Objective(mode, gamma), arrays, loss, samples)
    expected = reference_weighted_loss(mode, samples, WEIGHTS, gamma)
    assert reported == pytest.approx(expected, rel=1e-12)
    assert mode == "focal-task" or value == pytest.approx(expected, rel=1e-12)
    unweighted = [(task, tokens) for task, tokens, *_ in samples]
    assert reported != pytest.approx(reference_loss(mode, unweighted, WEIGHTS, gamma), rel=1e-3)


@pytest.mark.parametrize("mode", LOSSES)
def test_gradients_are_finite_differences(mode):
    """For focal-task, given the statistics of the step itself as those before."""
    arrays, loss, samples = made(2, rows=2, width=24)
    _, gradient, *_ = step(Objective(mode, 1.5), arrays, loss, samples, statistics(samples))
    loss = loss.astype(np.float64)
    for index in np.ndindex(*loss.shape):
        ends = []
        for move in (1e-5, -1e-5) if arrays[2][index] else ():
            moved = loss.copy()
            moved[index] += move
            moved_samples = weighted_samples(*arrays[:3], moved, *arrays[3:])
            ends.append(reference_weighted_loss(mode, moved_samples, WEIGHTS, 1.5))
        expected = (ends[0] - ends[1]) / 2e-5 if ends else 0.0
        assert gradient[index] == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("mode", LOSSES)
@pytest.mark.parametrize("per_micro_batch", [False, True])
def test_weights_of_1_change_no_bit(mode, per_micro_batch):
    *arrays, loss = random_batch(5)
    ones = np.ones(loss.shape, np.float32)
    objective = Objective(mode, per_micro_batch=per_micro_batch and mode not in FOCAL)
    samples, before = weighted_samples(*arrays, loss), statistics(weighted_samples(*arrays, loss))
    without = step(objective, (*arrays, None, None), loss, samples, before)
    with_ones = step(objective, (*arrays, ones * arrays[2], ones), loss, samples, before)
    for ours, theirs in zip(with_ones, without, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("mode", LINEAR)
def test_a_sample_of_weight_2_is_the_sample_twice(mode):
    """A row of weight 2 counts like two equal rows, in value, sums and gradient."""
    sample_ids, task_ids, mask, loss = random_batch(6)
    first = [array[:1] for array in (sample_ids, task_ids, mask, loss)]
    again = [np.concatenate([array, row]) for array, row in zip((sample_ids, task_ids, mask, loss), first, strict=True)]
    again[0][-1] += sample_ids.max() + 1
    double = np.ones(mask.shape, np.float32)
    double[0] = 2
    *twice, losses = again
    weights = (None, double)
    once = step(
        Objective(mode),
        (sample_ids, task_ids, mask, *weights),
        loss,
        weighted_samples(sample_ids, task_ids, mask, loss, *weights),
    )
    both = step(Objective(mode), (*twice, None, None), losses, weighted_samples(*twice, losses))
    assert once[0] == pytest.approx(both[0], rel=1e-12)
    np.testing.assert_allclose(once[1][0], both[1][0] + both[1][-1], rtol=1e-12)
    for name, ours, theirs in zip(SUMS, once[2], both[2], strict=True):
        if name != "tokens_K":
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", LINEAR)
def test_turns_count_relative_to_each_other_where_samples_are_equal(mode):
    """All turns three times as heavy change nothing but in losses by tokens, where other samples have weight 1."""
    arrays, loss, samples = made(7)
    value, *_ = step(Objective(mode), arrays, loss, samples)
    heavier = arrays[3].copy()
    heavier[0] *= 3
    samples = weighted_samples(*arrays[:3], loss, heavier, arrays[4])
    changed, *_ = step(Objective(mode), (*arrays[:3], heavier, arrays[4]), loss, samples)
    assert (changed == pytest.approx(value, rel=1e-6)) == (mode in ("sample", "task-sample"))


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("mode", LOSSES)
def test_sums_are_a_plain_loop(mode, kinds):
    arrays, loss, samples = made(4, *kinds)
    sums = dict(zip(SUMS, step(Objective(mode), arrays, loss, samples)[2].tolist(), strict=True))
    for task in range(4):
        here = [sample for sample in samples if sample[0] == task]
        pairs = [(v * u, value) for _, losses, turns, v in here for u, value in zip(turns, losses, strict=True)]
        assert sums["tokens_K"][task] == len(pairs)
        assert sums["token_weights_K"][task] == pytest.approx(sum(weight for weight, _ in pairs), rel=1e-13)
        assert sums["loss_K"][task] == pytest.approx(sum(weight * value for weight, value in pairs), rel=1e-13)


@pytest.mark.parametrize("kinds", KINDS)
def test_counts_of_a_micro_batch(kinds):
    arrays, _, samples = made(1, *kinds)
    for ours, theirs in zip(Supervision.of(as_batch(*arrays)).counts(4), weighed(samples, 4), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)


@pytest.mark.parametrize("mode", LINEAR)
def test_micro_batch_normalisation_is_the_mean_of_micro_batches(mode):
    """Each micro-batch by the weights in it, whether it has any or not."""
    objective, total, expected = Objective(mode, per_micro_batch=True), 0.0, []
    for seed, kinds in ((6, (True, True)), (7, (False, False)), (8, (False, True))):
        arrays, loss, samples = made(seed, *kinds, rows=1)
        total += step(objective, arrays, loss, samples, num_micro_batches=3)[0]
        expected.append(reference_weighted_loss(mode, samples, WEIGHTS))
    assert total == pytest.approx(np.mean(expected), rel=1e-12)


@pytest.mark.parametrize("mode", LOSSES)
def test_does_not_depend_on_how_the_batch_is_cut(mode):
    """Micro-batches of one row, some of which have no weights, add up to the whole."""
    (*arrays, token_weights, sample_weights), loss, _ = made(9)
    mask = arrays[2]
    token_weights[2:4], sample_weights[2:4] = mask[2:4], 1
    samples = weighted_samples(*arrays, loss, token_weights, sample_weights)
    before, objective = statistics(made(8)[2]), Objective(mode)
    value, gradient, sums, _ = step(objective, (*arrays, token_weights, sample_weights), loss, samples, before)
    factors = objective.before_step(*weighed(samples, 4), torch.tensor(WEIGHTS, dtype=torch.float64), before)
    total, total_sums = 0.0, torch.zeros_like(sums)
    for row in range(len(mask)):
        one = [array[row : row + 1] for array in (*arrays, token_weights, sample_weights)]
        batch = as_batch(one[0] - one[0].min(), *one[1:])
        if row in (2, 3):
            batch = dataclasses.replace(batch, token_weights_BS=None, sample_weights_BS=None)
        losses = torch.from_numpy(loss[row : row + 1]).double().requires_grad_()
        part, coefficient = objective.contribution(factors, batch, losses)
        total, total_sums = total + part.item(), total_sums + objective.sums(batch, losses, coefficient, 4)
        np.testing.assert_array_equal(torch.autograd.grad(part, losses)[0].numpy()[0], gradient[row])
    assert total == pytest.approx(value, rel=1e-13)
    torch.testing.assert_close(total_sums, sums, rtol=1e-13, atol=1e-18)
