"""One step of the optimizer that may be refused when its numbers are known, before anything is updated.

::

    gradients ─► norm ─► clipping ─► judge(loss, norm, losses of tasks) ─► update, or nothing

Megatron-Core's step reads the gradient norm on the host. The losses of the step come to the host with it, so that a
judgement of both adds no wait. All these numbers are results of all-reduces: every rank judges alike.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from mft_megatron.mcore.parallel.host_copies import copy_for_later


@dataclasses.dataclass(frozen=True)
class StepNumbers:
    """Numbers of a step that are known before its update, on the host and the same on every rank.

    Attributes:
        loss: the objective.
        grad_norm: before clipping.
        loss_K: fp64 [K], Σ l_t over supervised tokens of each task, times their weights.
        token_weights_K: fp64 [K], Σ of these weights; 0 for a task that the batch lacks.
    """

    loss: float
    grad_norm: float
    loss_K: np.ndarray
    token_weights_K: np.ndarray


# why a step must not update anything, or None
Judge: TypeAlias = Callable[[StepNumbers], str | None]


def accept(numbers: StepNumbers) -> None:
    """Judge every step to be good."""


@dataclasses.dataclass(frozen=True)
class Stepped:
    """A step of the optimizer.

    Attributes:
        updated: whether weights and states were updated on this rank.
        grad_norm: before clipping; ``None`` where gradients overflowed.
        zeros_in_grad: elements of the gradients that are 0, where they are counted.
        refused: why the judge refused the step; ``None`` where it did not, or was not asked.
    """

    updated: bool
    grad_norm: float | None
    zeros_in_grad: int | None
    refused: str | None


def guarded_step(
    optimizer: MegatronOptimizer, judge: Judge | None, loss_K: Tensor, token_weights_K: Tensor, objective_K: Tensor
) -> Stepped:
    """Take a step of the optimizer, unless the judge refuses it after gradients were clipped and before the update.

    Args:
        optimizer: Megatron-Core's, over all groups of weights.
        judge: is asked once, unless gradients overflow; ``None`` to ask nobody.
        loss_K: fp64 [K] on the device, of :class:`StepNumbers`.
        token_weights_K: fp64 [K] on the device, of :class:`StepNumbers`.
        objective_K: fp64 [K] on the device, each task's part of the objective.
    """
    if judge is None:
        updated, grad_norm, zeros = optimizer.step()
        return Stepped(updated, grad_norm, zeros, None)
    losses_3K = copy_for_later(torch.stack([loss_K, token_weights_K, objective_K]))
    compute_norm, update = optimizer.get_grad_norm, optimizer.step_with_ready_grads
    norms: list[float] = []
    refusals: list[str | None] = []

    def get_grad_norm() -> float:
        norms.append(float(compute_norm()))
        return norms[-1]

    def step_with_ready_grads() -> bool:
        of_tasks_K, weights_K, objectives_K = losses_3K.numpy()
        refusals.append(judge(StepNumbers(float(objectives_K.sum()), norms[-1], of_tasks_K, weights_K)))
        return update() if refusals[-1] is None else False

    # methods of this optimizer alone, for this step: its class looks them up on the object
    own = vars(optimizer)
    own.update(get_grad_norm=get_grad_norm, step_with_ready_grads=step_with_ready_grads)
    try:
        updated, grad_norm, zeros = optimizer.step()
    finally:
        del own["get_grad_norm"], own["step_with_ready_grads"]
    return Stepped(updated, grad_norm, zeros, refusals[-1] if refusals else None)
