"""CoBa, the convergence balancer (arXiv 2410.06741), as in the paper and as in MFTCoder's release v0.5."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from .balancer import Balancer, State
from .participation import append, mean_for_others, ratio, slopes, uniform


@dataclasses.dataclass(frozen=True)
class Coba(Balancer):
    """``w = DF·RCS + (1-DF)·ACS``: slow tasks count more while all converge, and those that diverge count less.

    Works on ratios of losses to those before the first step. State, fp64: ``ratio_HK`` and ``slope_HK``, the last H
    draws; ``largest_T``, the largest slope at each of the T draws since the warm-up.
    """

    needs_first_losses: ClassVar[bool] = True

    warmup_steps: int = 100
    history_length: int = 200
    tau: float = 5.0
    variant: str = "paper"

    def begin(self, num_tasks: int, first_loss_K: Tensor | None = None) -> State:
        """Make a state with empty histories.

        Raises:
            ValueError: the losses before the first step are missing.
        """
        if first_loss_K is None:
            raise ValueError("CoBa needs the losses before the first step")
        empty = torch.zeros(0, num_tasks, dtype=torch.float64)
        return {
            "first_loss_K": first_loss_K.clone(),
            "ratio_HK": empty,
            "slope_HK": empty,
            "largest_T": torch.zeros(0, dtype=torch.float64),
        }

    def update(self, state: State, loss_K: Tensor, step: int) -> tuple[State, Tensor, Tensor]:
        """Weigh by the slopes of the last ratios; uniformly in the warm-up."""
        ratio_HK = append(state["ratio_HK"], ratio(loss_K, state["first_loss_K"]), self.history_length)
        state = {**state, "ratio_HK": ratio_HK}
        if step < self.warmup_steps:
            return state, uniform(len(loss_K)), torch.ones(len(loss_K), dtype=torch.bool)

        slope_HK = append(state["slope_HK"], slopes(ratio_HK), self.history_length)
        took_part_K = slope_HK.ne(0).any(0)
        largest = self._largest(ratio_HK[:, took_part_K], slope_HK[-1][took_part_K])
        largest_T = torch.cat([state["largest_T"], largest])
        state = {**state, "slope_HK": slope_HK, "largest_T": largest_T}
        if not took_part_K.any():
            return state, uniform(len(loss_K)), took_part_K
        weight = self._weights(slope_HK[:, took_part_K], largest_T)
        return state, mean_for_others(weight, took_part_K), took_part_K

    def _largest(self, ratio_HN: Tensor, slope_N: Tensor) -> Tensor:
        """``a_max`` of this draw, fp64 [1]: 0 where no task takes part; N tasks take part."""
        if not len(slope_N):
            return torch.zeros(1, dtype=torch.float64)
        if self.variant == "release":
            return slopes(ratio_HN.amax(1, keepdim=True))
        return slope_N.max()[None]

    def _weights(self, slope_HN: Tensor, largest_T: Tensor) -> Tensor:
        """Weights of the N tasks that take part, fp64 [N]."""
        (window, tasks), now_N = slope_HN.shape, slope_HN[-1]
        relative_N = ratio(tasks * now_N, now_N.abs().sum()).softmax(0)
        absolute_N = ratio(-window * now_N, slope_HN.abs().sum(0)).softmax(0)
        steps = len(largest_T)
        divergence = steps * ratio(-self.tau * steps * largest_T, largest_T.abs().sum()).softmax(0)[-1]
        if self.variant == "paper":
            divergence = divergence.clamp(max=1)
        weight_N = divergence * relative_N + (1 - divergence) * absolute_N
        if self.variant == "paper":
            return weight_N
        weight_N = (tasks * weight_N).softmax(0)
        least = 1 / (10 * tasks)
        return weight_N * (1 - least * tasks) + least if (weight_N < least).any() else weight_N
