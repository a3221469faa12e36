"""The objective never makes the host wait for the device: neither to read a number, nor to learn a size, nor to copy.

Without a GPU the step runs on the meta device, whose tensors have shapes and no numbers: whatever asks for one fails.
"""

import dataclasses

import pytest
import torch
from batches import as_batch, by_sample, counted, random_batch
from torch.utils._python_dispatch import TorchDispatchMode

from mft_megatron.loss_names import FOCAL, LOSSES
from mft_megatron.losses.focal import TaskStatistics
from mft_megatron.losses.objective import Objective

TASKS = 4
OBJECTIVES = [
    *(Objective(mode) for mode in LOSSES),
    *(Objective(mode, gamma=0.5, detach=True) for mode in FOCAL),
    *(Objective(mode, per_micro_batch=True) for mode in LOSSES if mode not in FOCAL),
]


class NoBlockingCopies(TorchDispatchMode):
    """Fails where a tensor goes from one kind of device to another and the host waits for it."""

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        result = operator(*arguments, **(keywords or {}))
        if operator is torch.ops.aten._to_copy.default:
            moved = arguments[0].device.type != result.device.type
            assert not moved or keywords.get("non_blocking"), f"a copy to {result.device} that the host waits for"
        elif operator is torch.ops.aten.copy_.default:
            moved = arguments[0].device.type != arguments[1].device.type
            assert not moved or arguments[2:3] == (True,), f"a copy to {result.device} that the host waits for"
        return result


def inputs(device):
    """A micro-batch and its losses on the device; its counts on the host, where the plan of a step makes them."""
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
    """All that a step computes, as of one micro-batch, forward and backward."""
    factors = objective.before_step(*counts_K, torch.ones(TASKS), statistics, num_micro_batches=2).to(losses.device)
    slope = objective.slope(factors, batch)
    if slope is not None:
        slope.take(torch.zeros(2, dtype=torch.int64, device=losses.device)).at(losses.flatten()[:2])
    value, coefficient = objective.of(factors, batch, losses)
    (gradient,) = torch.autograd.grad(value, losses)
    sums = objective.sums(batch, losses, coefficient, TASKS)
    objective.statistics_after(statistics, sums, counts_K[1])
    return gradient, objective.by_task(factors, sums, counts_K[1])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_nothing_asks_the_device_for_a_number(objective):
    made = inputs("meta")
    with NoBlockingCopies():
        gradient, by_task_K = run(objective, *made)
    assert gradient.is_meta
    assert by_task_K.is_meta


PLANTS = {
    "item": lambda loss_BS, mask_BS: loss_BS.sum().item(),
    "if": lambda loss_BS, mask_BS: 1 if loss_BS.sum() > 0 else 2,
    "list": lambda loss_BS, mask_BS: loss_BS.tolist(),
    "boolean mask": lambda loss_BS, mask_BS: loss_BS[mask_BS > 0],
    "unique": lambda loss_BS, mask_BS: mask_BS.unique(),
    "to the host": lambda loss_BS, mask_BS: loss_BS.cpu(),
    "from the host": lambda loss_BS, mask_BS: torch.ones(2).to(loss_BS.device),
    "into a tensor of the device": lambda loss_BS, mask_BS: torch.empty_like(loss_BS).copy_(torch.ones(1)),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_the_check_sees_a_planted_wait(plant):
    class Planted(Objective):
        def of(self, factors, batch, loss_BS):
            PLANTS[plant](loss_BS.detach(), batch.loss_mask_BS)
            return super().of(factors, batch, loss_BS)

    made = inputs("meta")
    with pytest.raises((RuntimeError, AssertionError)), NoBlockingCopies():
        run(Planted(), *made)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_cuda_sees_no_wait(objective):
    made = inputs("cuda")
    run(objective, *made)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(objective, *made)
        with pytest.raises(RuntimeError):
            made[1].sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
