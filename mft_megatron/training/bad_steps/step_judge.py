"""The judge of steps: whether loss, losses of tasks and gradient norm are finite, and whether they jump."""

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from mft_megatron.arguments.groups.bad_steps import BadStepArguments
from mft_megatron.mcore.optim.guarded_step import StepNumbers

from .robust_window import RobustWindow, WindowState

# where values hardly vary, a robust deviation is at least this part of a loss, and this factor of the norm less 1
LEAST_LOSS, LEAST_LOG_NORM = 0.01, 0.05
# a gradient norm below this is compared as this one
SMALLEST_NORM = 1e-30


class JudgeState(TypedDict):
    """The judge in a checkpoint: names of the tasks, and the windows of losses and of the logarithm of the norm."""

    tasks: list[str]
    losses: WindowState
    norm: WindowState


class StepJudge:
    """Judges the numbers of a step before its update; the same on every rank, since all have the same numbers.

    Without ``--loss-spike-factor`` only what is not finite is bad.

    Attributes:
        jumped: whether the newest bad step had finite numbers, of which one jumped.
    """

    def __init__(self, options: BadStepArguments, task_names: Sequence[str]):
        """
        Args:
            options: of the run.
            task_names: K names.
        """
        self._factor, self._tasks = options.loss_spike_factor, tuple(task_names)
        self._losses = RobustWindow(1 + len(self._tasks), options.loss_spike_window, least_part=LEAST_LOSS)
        # norms vary by factors, and a factor is a difference of logarithms
        self._norm = RobustWindow(1, options.loss_spike_window, least=LEAST_LOG_NORM)
        self._newest: tuple[np.ndarray, np.ndarray] | None = None
        self.jumped = False

    def __call__(self, numbers: StepNumbers) -> str | None:
        """Return why a step is bad, or ``None``."""
        names = ("the loss", *(f"the loss of task {name}" for name in self._tasks), "the gradient norm")
        with np.errstate(divide="ignore", invalid="ignore"):
            loss_K = numbers.loss_K / numbers.token_weights_K
        absent_K = (numbers.token_weights_K == 0) & (numbers.loss_K == 0)
        value_S = np.array([numbers.loss, *np.where(absent_K, 0.0, loss_K), numbers.grad_norm])
        for name, value in zip(names, value_S, strict=True):
            if not math.isfinite(value):
                self.jumped = False
                return f"{name} is {value:g}"
        if self._factor is None:
            return None
        losses_S = np.array([numbers.loss, *np.where(absent_K, np.nan, loss_K)])
        norm_S = np.log(np.maximum(np.array([numbers.grad_norm]), SMALLEST_NORM))
        self._newest = losses_S, norm_S
        (score_S, median_S), (norm_score_S, norm_median_S) = self._losses.score(losses_S), self._norm.score(norm_S)
        scores = np.array([*score_S, *norm_score_S])
        medians = np.array([*median_S, *np.exp(norm_median_S)])
        high = np.flatnonzero(scores > self._factor)
        if not len(high):
            return None
        self.jumped = True
        worst = high[scores[high].argmax()]
        return (
            f"{names[worst]} is {value_S[worst]:.4g}, {scores[worst]:.1f} robust standard deviations above its median "
            f"{medians[worst]:.4g} (--loss-spike-factor {self._factor:g})"
        )

    def accept(self) -> None:
        """Add the numbers of the newest step to the windows, after it updated the weights."""
        if self._newest is not None:
            self._losses.add(self._newest[0])
            self._norm.add(self._newest[1])
            self._newest = None

    def state(self) -> JudgeState:
        """The state for a checkpoint."""
        return {"tasks": list(self._tasks), "losses": self._losses.state(), "norm": self._norm.state()}

    def load(self, state: JudgeState) -> None:
        """Continue from a checkpoint's state; the windows of other tasks start empty."""
        if state["tasks"] == list(self._tasks):
            self._losses.load(state["losses"])
            self._norm.load(state["norm"])
