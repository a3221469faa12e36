"""Coefficients against docs/LOSSES.md written out in numpy, slow and obvious, fp64."""

import numpy as np
import pytest
import torch

from mft_megatron.losses.segments import task_sums
from mft_megatron.losses.supervision import Supervision
from mft_megatron.losses.table import LOSSES
from tests.batches import as_batch, by_sample, counted, random_batch
from tests.reference import reference_loss

LINEAR = ("token", "sample", "task-token", "task-sample")


def by_mode(mode, factor_K, task_ids, sample_ids, mask):
    """Coefficients from arrays."""
    supervision = Supervision.of(as_batch(sample_ids, task_ids, mask))
    return supervision.coefficients(factor_K, LOSSES[mode].sample_means)


@pytest.mark.parametrize("mode", LINEAR)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (0.5, 3.0, 0.0, 2.0)])
def test_equals_the_reference(mode, seed, weights):
    sample_ids, task_ids, mask, loss = random_batch(seed)
    samples = by_sample(sample_ids, task_ids, mask, loss)
    factor_K = LOSSES[mode].task_factors(*counted(samples, 4), torch.tensor(weights, dtype=torch.float64))
    c = by_mode(mode, factor_K, task_ids, sample_ids, mask)
    assert c.dtype == torch.float64
    assert (c.numpy()[mask == 0] == 0).all()
    value = float((c * torch.from_numpy(loss)).sum())
    assert value == pytest.approx(reference_loss(mode, samples, weights), rel=1e-12)


@pytest.mark.parametrize("mode", LINEAR)
def test_does_not_depend_on_how_the_batch_is_cut(mode):
    sample_ids, task_ids, mask, loss = random_batch(7)
    samples = by_sample(sample_ids, task_ids, mask, loss)
    factor_K = LOSSES[mode].task_factors(*counted(samples, 4), torch.tensor([1.0, 2.0, 0.5, 1.0]))
    whole = by_mode(mode, factor_K, task_ids, sample_ids, mask)
    for row in range(len(mask)):
        row_ids = sample_ids[row] - sample_ids[row].min()
        part = by_mode(mode, factor_K, task_ids[row : row + 1], row_ids[None], mask[row : row + 1])
        assert torch.equal(part[0], whole[row])


@pytest.mark.parametrize("mode", ["task-token", "task-sample"])
def test_realised_share_is_the_weight(mode):
    """Whatever the data sizes: the reference implementation lacks this at small micro-batches."""
    sample_ids, task_ids, mask, loss = random_batch(3)
    samples = by_sample(sample_ids, task_ids, mask, loss)
    weight_K = torch.tensor([1.0, 5.0, 2.0, 9.0])
    factor_K = LOSSES[mode].task_factors(*counted(samples, 4), weight_K)
    c = by_mode(mode, factor_K, task_ids, sample_ids, mask)
    share_K = task_sums(torch.from_numpy(task_ids), c, 4)
    expected = torch.tensor([1.0, 5.0, 2.0, 0.0], dtype=torch.float64) / 8.0  # task 3 is absent
    torch.testing.assert_close(share_K, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("mode", LINEAR)
def test_nothing_supervised_gives_zero_and_never_nan(mode):
    zero = torch.zeros(3, dtype=torch.int64)
    factor_K = LOSSES[mode].task_factors(zero, zero, torch.ones(3))
    assert factor_K.tolist() == [0, 0, 0]
    ids = np.zeros((2, 5), np.int64)
    assert by_mode(mode, factor_K, ids, ids, ids).abs().sum() == 0


@pytest.mark.parametrize("mode", ["task-token", "task-sample"])
def test_only_tasks_of_weight_zero_gives_zero(mode):
    factor_K = LOSSES[mode].task_factors(torch.tensor([5, 0]), torch.tensor([1, 0]), torch.tensor([0.0, 1.0]))
    assert factor_K.tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(4))
def test_counts_of_a_micro_batch(seed):
    sample_ids, task_ids, mask, loss = random_batch(seed)
    tokens_K, samples_K = Supervision.of(as_batch(sample_ids, task_ids, mask)).counts(4)
    expected = counted(by_sample(sample_ids, task_ids, mask, loss), 4)
    torch.testing.assert_close(tokens_K, expected[0].double(), rtol=0, atol=0)
    torch.testing.assert_close(samples_K, expected[1].double(), rtol=1e-14, atol=0)
