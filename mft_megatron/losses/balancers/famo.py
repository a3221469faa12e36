"""FAMO (arXiv 2306.03792) on validation losses: MFTCoder's Eq. 4."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from .balancer import Balancer, State

EPS = 1e-8


@dataclasses.dataclass(frozen=True)
class Famo(Balancer):
    """Weights ``w ∝ softmax(xi) / (L - b)``; Adam moves ``xi`` towards the tasks whose log loss fell least.

    ``min_losses`` are the ``b`` of the K tasks; ``None`` for 0. State, fp64 [K]: ``xi_K``; Adam's ``mean_K`` and
    ``square_K``; ``distance_K``, ``L - b`` of the last draw, empty before the first. ``adam_steps``: int64 scalar.
    """

    fixed_draw: ClassVar[bool] = True
    task_options: ClassVar[tuple[str, ...]] = ("min_losses",)

    lr: float = 0.025
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    min_losses: tuple[float, ...] | None = None

    def begin(self, num_tasks: int, first_loss_K: Tensor | None = None) -> State:
        """Make a state with equal logits; there is no draw to compare with yet."""
        zeros = {name: torch.zeros(num_tasks, dtype=torch.float64) for name in ("xi_K", "mean_K", "square_K")}
        return {**zeros, "distance_K": torch.zeros(0, dtype=torch.float64), "adam_steps": torch.tensor(0)}

    def update(self, state: State, loss_K: Tensor, step: int) -> tuple[State, Tensor, Tensor]:
        """Move the logits by the improvement since the draw before, then weigh."""
        lowest_K = torch.zeros_like(loss_K) if self.min_losses is None else loss_K.new_tensor(self.min_losses)
        distance_K = (loss_K - lowest_K).clamp(min=0) + EPS
        state = {**state, "distance_K": distance_K} if not len(state["distance_K"]) else self._step(state, distance_K)
        weight_K = state["xi_K"].softmax(0) / distance_K
        return state, weight_K / weight_K.sum(), torch.ones(len(loss_K), dtype=torch.bool)

    def _step(self, state: State, distance_K: Tensor) -> State:
        """Take one step of Adam on ``xi``, with L2 weight decay as in the code of FAMO's authors."""
        improvement_K = state["distance_K"].log() - distance_K.log()
        z_K = state["xi_K"].softmax(0)
        gradient_K = z_K * (improvement_K - z_K @ improvement_K) + self.weight_decay * state["xi_K"]
        steps = state["adam_steps"] + 1
        mean_K = self.beta1 * state["mean_K"] + (1 - self.beta1) * gradient_K
        square_K = self.beta2 * state["square_K"] + (1 - self.beta2) * gradient_K.square()
        moved_K = mean_K / (1 - self.beta1 ** steps.item())
        scale_K = (square_K / (1 - self.beta2 ** steps.item())).sqrt() + 1e-8
        return {
            "xi_K": state["xi_K"] - self.lr * moved_K / scale_K,
            "mean_K": mean_K,
            "square_K": square_K,
            "distance_K": distance_K,
            "adam_steps": steps,
        }
