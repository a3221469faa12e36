"""All that a step computes of the objective, on any device, for every loss."""

import dataclasses

import torch

from mft_megatron.loss_names import FOCAL, LOSSES
from mft_megatron.losses.focal import TaskStatistics
from mft_megatron.losses.objective import Objective
from tests.batches import as_batch, random_batch, random_weights, weighed, weighted_samples

TASKS = 4
OBJECTIVES = [
    *(Objective(mode) for mode in LOSSES),
    *(Objective(mode, gamma=0.5, detach=True) for mode in FOCAL),
    *(Objective(mode, per_micro_batch=True) for mode in LOSSES if mode not in FOCAL),
]


def inputs(device, weighted=False):
    """A micro-batch and its losses on the device; its counts on the host, as in the plan of a step."""
    *arrays, loss = random_batch(0, TASKS)
    weights = random_weights(0, arrays[0], arrays[2]) if weighted else ()
    batch = as_batch(*arrays, *weights)
    there = {
        field.name: value.to(device)
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), torch.Tensor)
    }
    counts_K = weighed(weighted_samples(*arrays, loss, *weights), TASKS)
    losses = torch.from_numpy(loss).to(device).requires_grad_()
    return dataclasses.replace(batch, **there), losses, counts_K, TaskStatistics.none(TASKS, device)


def run(objective, batch, losses, counts_K, statistics):
    """Compute everything of a step that has one micro-batch, forward and backward."""
    sizes = {"num_micro_batches": 2, "num_batches": 3.5}
    factors = objective.before_step(*counts_K, torch.ones(TASKS), statistics, **sizes).to(losses.device)
    weighed = objective.weigh(factors, batch)
    slope = objective.slope(factors, batch, weighed)
    if slope is not None:
        slope.take(torch.zeros(2, dtype=torch.int64, device=losses.device)).at(losses.flatten()[:2])
    value, coefficient = objective.contribution(factors, batch, losses, weighed=weighed)
    (gradient,) = torch.autograd.grad(value, losses)
    sums = objective.sums(batch, losses, coefficient, TASKS, weighed=weighed)
    objective.statistics_after(statistics, sums, counts_K[1])
    return gradient, objective.by_task(factors, sums, counts_K[1])
