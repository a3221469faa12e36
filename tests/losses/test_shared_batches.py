"""A micro-batch whose tokens several ranks share: the sum of their parts is the whole, in value, gradient and sums."""

import dataclasses

import pytest
import torch

from mft_megatron.loss_names import FOCAL, LOSSES
from mft_megatron.losses.focal import TaskStatistics
from mft_megatron.losses.objective import Objective
from tests.batches import as_batch, by_sample, counted, random_batch

TASKS, RANKS = 4, 3
OBJECTIVES = [
    *(Objective(mode) for mode in LOSSES),
    *(Objective(mode, gamma=0.5, detach=True) for mode in FOCAL),
    *(Objective(mode, per_micro_batch=True) for mode in LOSSES if mode not in FOCAL),
]


def made(seed):
    *arrays, loss = random_batch(seed, TASKS)
    counts_K = counted(by_sample(*arrays, loss), TASKS)
    random = torch.Generator().manual_seed(seed)
    statistics = TaskStatistics(*torch.rand(3, TASKS, dtype=torch.float64, generator=random).clamp(0.1, 0.9))
    return as_batch(*arrays), torch.from_numpy(loss).double(), counts_K, statistics


def alone(objective, batch, loss_BS, factors):
    """Value, gradient and sums of one rank that has all tokens."""
    losses = loss_BS.clone().requires_grad_()
    value, coefficient_BS = objective.contribution(factors, batch, losses)
    (gradient,) = torch.autograd.grad(value, losses)
    return value, gradient, objective.sums(batch, losses, coefficient_BS, TASKS)


def shared(objective, batch, loss_BS, factors, owner_BS):
    """The same of ranks that have some tokens each, added up. Sums over ranks are made of what all ranks hand in.

    All ranks are in one graph here, so the gradient of a rank's tokens collects what other ranks make of them.
    """
    losses = loss_BS.clone().requires_grad_()
    own = [losses * (owner_BS == rank) for rank in range(RANKS)]
    handed_in = []
    for part in own:  # what each rank would bring to the sum
        objective.contribution(factors, batch, part, lambda value: handed_in.append(value) or value)
    total = sum(handed_in) if handed_in else None
    value, sums = 0, 0
    for rank, part in enumerate(own):
        of_rank, coefficient_BS = objective.contribution(factors, batch, part, lambda value: total)
        value = value + of_rank
        sums = sums + objective.sums(batch, part, coefficient_BS, TASKS, owner_BS == rank)
    (gradient,) = torch.autograd.grad(value, losses)
    return value, gradient, sums


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_parts_add_up(objective, seed):
    batch, loss_BS, counts_K, statistics = made(seed)
    weights = torch.tensor([0.5, 3.0, 1.25, 2.0], dtype=torch.float64)
    factors = objective.before_step(*counts_K, weights, statistics, num_micro_batches=2)
    owner_BS = torch.randint(RANKS, loss_BS.shape, generator=torch.Generator().manual_seed(seed))
    owner_BS[0], owner_BS[1] = 1, 2  # whole samples, and rows, on one rank
    for ours, theirs in zip(
        shared(objective, batch, loss_BS, factors, owner_BS), alone(objective, batch, loss_BS, factors), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_sample_on_two_ranks_needs_both():
    """Without the sum each rank would modulate by its own tokens alone: another loss, without an error."""
    batch, loss_BS, counts_K, statistics = made(0)
    objective = Objective("focal-sample")
    factors = objective.before_step(*counts_K, torch.ones(TASKS), statistics)
    owner_BS = torch.arange(loss_BS.numel()).view(loss_BS.shape) % 2
    own = [objective.contribution(factors, batch, loss_BS * (owner_BS == rank))[0] for rank in range(2)]
    whole = alone(objective, batch, loss_BS, factors)[0]
    assert abs(sum(own).item() / whole.item() - 1) > 0.1


def test_only_focal_sample_asks_other_ranks():
    """Every other loss is known by each rank from the whole batch, so it costs no message."""
    batch, loss_BS, counts_K, statistics = made(0)
    for objective in OBJECTIVES:
        asked = []
        factors = objective.before_step(*counts_K, torch.ones(TASKS), statistics)
        objective.contribution(factors, batch, loss_BS, lambda value, asked=asked: asked.append(value) or value)
        assert len(asked) == (objective.mode == "focal-sample"), dataclasses.asdict(objective)
