"""A micro-batch whose tokens several ranks share: the sum of their parts is the whole, in value, gradient and sums."""

import dataclasses

import pytest
import torch

from mft_megatron.losses.focal import TaskStatistics
from mft_megatron.losses.objective import Objective
from tests.batches import as_batch, random_batch, random_weights, weighed, weighted_samples
from tests.objective_step import OBJECTIVES, TASKS

RANKS = 3


def micro_batch(seed):
    """A micro-batch, its token losses in fp64, the counts of its tasks, and statistics of earlier steps.

    Samples and turns have weights where the seed is odd.
    """
    *arrays, loss = random_batch(seed, TASKS)
    weights = random_weights(seed, arrays[0], arrays[2]) if seed % 2 else ()
    counts_K = weighed(weighted_samples(*arrays, loss, *weights), TASKS)
    random = torch.Generator().manual_seed(seed)
    statistics = TaskStatistics(*torch.rand(3, TASKS, dtype=torch.float64, generator=random).clamp(0.1, 0.9))
    return as_batch(*arrays, *weights), torch.from_numpy(loss).double(), counts_K, statistics


def on_one_rank(objective, batch, loss_BS, factors):
    """Value, gradient and sums of one rank that computes all tokens."""
    losses = loss_BS.clone().requires_grad_()
    value, coefficient_BS = objective.contribution(factors, batch, losses)
    (gradient,) = torch.autograd.grad(value, losses)
    return value, gradient, objective.sums(batch, losses, coefficient_BS, TASKS)


def on_several_ranks(objective, batch, loss_BS, factors, owner_BS):
    """The same of ranks that compute some tokens each, added up; ``owner_BS`` has the rank of each token.

    All ranks are in one graph here, so the gradient of a rank's tokens includes that through the sums of other ranks.
    """
    losses = loss_BS.clone().requires_grad_()
    parts = [losses * (owner_BS == rank) for rank in range(RANKS)]
    summands = []
    for part in parts:  # collect what each rank would add to the sum over ranks
        objective.contribution(factors, batch, part, lambda value: summands.append(value) or value)
    total = sum(summands) if summands else None
    value, sums = 0, 0
    for rank, part in enumerate(parts):
        rank_value, coefficient_BS = objective.contribution(factors, batch, part, lambda value: total)
        value = value + rank_value
        sums = sums + objective.sums(batch, part, coefficient_BS, TASKS, owner_BS == rank)
    (gradient,) = torch.autograd.grad(value, losses)
    return value, gradient, sums


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_parts_add_up(objective, seed):
    batch, loss_BS, counts_K, statistics = micro_batch(seed)
    weights = torch.tensor([0.5, 3.0, 1.25, 2.0], dtype=torch.float64)
    factors = objective.before_step(*counts_K, weights, statistics, num_micro_batches=2)
    owner_BS = torch.randint(RANKS, loss_BS.shape, generator=torch.Generator().manual_seed(seed))
    owner_BS[0], owner_BS[1] = 1, 2  # whole samples, and rows, on one rank
    for several, one in zip(
        on_several_ranks(objective, batch, loss_BS, factors, owner_BS),
        on_one_rank(objective, batch, loss_BS, factors),
        strict=True,
    ):
        torch.testing.assert_close(several, one, rtol=1e-12, atol=1e-14)


def test_a_sample_on_two_ranks_needs_both():
    """Without the sum each rank would modulate by its own tokens alone: another loss, without an error."""
    batch, loss_BS, counts_K, statistics = micro_batch(0)
    objective = Objective("focal-sample")
    factors = objective.before_step(*counts_K, torch.ones(TASKS), statistics)
    owner_BS = torch.arange(loss_BS.numel()).view(loss_BS.shape) % 2
    parts = [objective.contribution(factors, batch, loss_BS * (owner_BS == rank))[0] for rank in range(2)]
    whole = on_one_rank(objective, batch, loss_BS, factors)[0]
    assert abs(sum(parts).item() / whole.item() - 1) > 0.1


def test_only_focal_sample_sums_over_ranks():
    """Every rank computes the coefficients of other losses from the whole batch, without communication."""
    batch, loss_BS, counts_K, statistics = micro_batch(0)
    for objective in OBJECTIVES:
        calls = []
        factors = objective.before_step(*counts_K, torch.ones(TASKS), statistics)
        objective.contribution(factors, batch, loss_BS, lambda value, calls=calls: calls.append(value) or value)
        assert len(calls) == (objective.mode == "focal-sample"), dataclasses.asdict(objective)
