"""Self-paced weights by the slopes of validation losses (MFTCoder release v0.3)."""

import dataclasses

import torch
from torch import Tensor

from .balancer import Balancer, State
from .participation import append, is_flat, mean_for_others, ratio, slopes, uniform


@dataclasses.dataclass(frozen=True)
class SelfPaced(Balancer):
    """``n = N a / Σ|a|``, ``score = softmax(n)·(-n)``, ``w = softmax(scale·score)`` with the slopes ``a``.

    Weights are uniform until there are ``history_length`` draws. State: ``history_HK``, fp64, the last H draws.
    """

    history_length: int = 100
    scale_factor: float = 50.0

    def begin(self, num_tasks: int, first_loss_K: Tensor | None = None) -> State:
        """Make a state without draws."""
        return {"history_HK": torch.zeros(0, num_tasks, dtype=torch.float64)}

    def update(self, state: State, loss_K: Tensor, step: int) -> tuple[State, Tensor, Tensor]:
        """Weigh by the slopes of the last losses; uniformly before there are enough."""
        history_HK = append(state["history_HK"], loss_K, self.history_length)
        state = {"history_HK": history_HK}
        if len(history_HK) < self.history_length:
            return state, uniform(len(loss_K)), torch.ones(len(loss_K), dtype=torch.bool)
        took_part_K = ~is_flat(history_HK)
        slope = slopes(history_HK)[took_part_K]
        normalised = ratio(len(slope) * slope, slope.abs().sum())
        score = normalised.softmax(0) * -normalised
        return state, mean_for_others((self.scale_factor * score).softmax(0), took_part_K), took_part_K
