"""Coefficients against docs/LOSSES.md written out in numpy, slow and obvious, fp64."""

import numpy as np
import pytest
import torch
from reference import reference_loss

from mft_megatron.losses.coefficients import FACTORS, coefficients, task_factors, task_sums


def random_batch(seed, tasks=4, rows=6, width=40):
    """Rows of samples with uneven masks; one task absent, one sample without supervision, padding at row ends."""
    rng = np.random.default_rng(seed)
    sample_ids = np.zeros((rows, width), np.int64)
    task_ids = np.zeros((rows, width), np.int64)
    mask = np.zeros((rows, width), np.uint8)
    number = 0
    for row in range(rows):
        position = 0
        while position < width:
            length = min(int(rng.integers(2, 15)), width - position)
            span = slice(position, position + length)
            sample_ids[row, span] = number
            task_ids[row, span] = rng.integers(0, tasks - 1)  # the last task never appears
            if number % 5 != 4:
                mask[row, span] = rng.random(length) < 0.7
            position += length
            number += 1
    return sample_ids, task_ids, mask, rng.uniform(0.1, 6.0, (rows, width)).astype(np.float32)


def by_sample(sample_ids, task_ids, mask, loss):
    return [
        (int(task_ids[sample_ids == s][0]), loss[(sample_ids == s) & (mask == 1)]) for s in range(sample_ids.max() + 1)
    ]


def counts(samples, tasks):
    tokens_K = np.zeros(tasks, np.int64)
    samples_K = np.zeros(tasks, np.int64)
    for task, tokens in samples:
        tokens_K[task] += len(tokens)
        samples_K[task] += len(tokens) > 0
    return torch.from_numpy(tokens_K), torch.from_numpy(samples_K)


@pytest.mark.parametrize("mode", FACTORS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (0.5, 3.0, 0.0, 2.0)])
def test_equals_the_reference(mode, seed, weights):
    sample_ids, task_ids, mask, loss = random_batch(seed)
    samples = by_sample(sample_ids, task_ids, mask, loss)
    factor_K = task_factors(mode, *counts(samples, 4), torch.tensor(weights, dtype=torch.float64))
    c = coefficients(mode, factor_K, *map(torch.from_numpy, (task_ids, sample_ids, mask)), sample_ids.max() + 1)
    assert c.dtype == torch.float32
    assert (c.numpy()[mask == 0] == 0).all()
    value = float((c.double() * torch.from_numpy(loss)).sum())
    assert value == pytest.approx(reference_loss(mode, samples, weights), rel=3e-7)


@pytest.mark.parametrize("mode", FACTORS)
def test_does_not_depend_on_how_the_batch_is_cut(mode):
    sample_ids, task_ids, mask, loss = random_batch(7)
    samples = by_sample(sample_ids, task_ids, mask, loss)
    factor_K = task_factors(mode, *counts(samples, 4), torch.tensor([1.0, 2.0, 0.5, 1.0]))
    whole = coefficients(mode, factor_K, *map(torch.from_numpy, (task_ids, sample_ids, mask)), sample_ids.max() + 1)
    for row in range(len(mask)):
        own = sample_ids[row] - sample_ids[row].min()
        part = coefficients(
            mode, factor_K, *map(torch.from_numpy, (task_ids[row : row + 1], own[None], mask[row : row + 1])), 40
        )
        assert torch.equal(part[0], whole[row])


@pytest.mark.parametrize("mode", ["task-token", "task-sample"])
def test_realised_share_is_the_weight(mode):
    """Whatever the data sizes: the reference implementation lacks this at small micro-batches."""
    sample_ids, task_ids, mask, loss = random_batch(3)
    samples = by_sample(sample_ids, task_ids, mask, loss)
    weight_K = torch.tensor([1.0, 5.0, 2.0, 9.0])
    factor_K = task_factors(mode, *counts(samples, 4), weight_K)
    c = coefficients(mode, factor_K, *map(torch.from_numpy, (task_ids, sample_ids, mask)), sample_ids.max() + 1)
    share_K = task_sums(torch.from_numpy(task_ids), c, 4)
    expected = torch.tensor([1.0, 5.0, 2.0, 0.0], dtype=torch.float64) / 8.0  # task 3 is absent
    torch.testing.assert_close(share_K, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", FACTORS)
def test_nothing_supervised_gives_zero_and_never_nan(mode):
    zero = torch.zeros(3, dtype=torch.int64)
    factor_K = task_factors(mode, zero, zero, torch.ones(3))
    assert factor_K.tolist() == [0, 0, 0]
    ids = torch.zeros(2, 5, dtype=torch.int64)
    assert coefficients(mode, factor_K, ids, ids, ids, 1).abs().sum() == 0


@pytest.mark.parametrize("mode", ["task-token", "task-sample"])
def test_only_tasks_of_weight_zero_gives_zero(mode):
    factor_K = task_factors(mode, torch.tensor([5, 0]), torch.tensor([1, 0]), torch.tensor([0.0, 1.0]))
    assert factor_K.tolist() == [0, 0]
