"""All that a step computes of the objective, on any device, for every loss."""

import dataclasses

import torch

from mft_megatron.loss_names import FOCAL, LOSSES
from mft_megatron.losses.focal import TaskStatistics
from mft_megatron.losses.objective import Objective
from tests.batches import as_batch, by_sample, counted, random_batch

TASKS = 4
OBJECTIVES = [
    *(Objective(mode) for mode in LOSSES),
    *(Objective(mode, gamma=0.5, detach=True) for mode in FOCAL),
    *(Objective(mode, per_micro_batch=True) for mode in LOSSES if mode not in FOCAL),
]


def inputs(device):
    """A micro-batch and its losses on the device; its counts on the host, as in the plan of a step."""
    *arrays, loss = random_batch(0, TASKS)
    batch = as_batch(*arrays)
    there = {
        field.name: value.to(device)
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), torch.Tensor)
    }
    counts_K = counted(by_sample(*arrays, loss), TASKS)
    losses = torch.from_numpy(loss).to(device).requires_grad_()
    return dataclasses.replace(batch, **there), losses, counts_K, TaskStatistics.none(TASKS, device)


def run(objective, batch, losses, counts_K, statistics):
    """Compute everything of a step that has one micro-batch, forward and backward."""
    factors = objective.before_step(*counts_K, torch.ones(TASKS), statistics, num_micro_batches=2).to(losses.device)
    slope = objective.slope(factors, batch)
    if slope is not None:
        slope.take(torch.zeros(2, dtype=torch.int64, device=losses.device)).at(losses.flatten()[:2])
    value, coefficient = objective.contribution(factors, batch, losses)
    (gradient,) = torch.autograd.grad(value, losses)
    sums = objective.sums(batch, losses, coefficient, TASKS)
    objective.statistics_after(statistics, sums, counts_K[1])
    return gradient, objective.by_task(factors, sums, counts_K[1])
