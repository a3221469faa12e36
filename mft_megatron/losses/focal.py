"""The focal losses: Eq. 2 by samples, Eq. 3 by tasks (docs/LOSSES.md §3).

``p_t = exp(-l_t)`` is the probability of a target. What the model *misses* of a sample, ``1 - P_j``, is the mean of
``1 - p_t`` over its supervised tokens, weighted by ``u_t``, computed without the cancellation of 1 and ``P_j``. A
modulating factor is a miss to the power gamma.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from .segments import inverse, spread
from .supervision import Supervision


def token_miss(loss: Tensor) -> Tensor:
    """``1 - exp(-l_t)`` of token losses of any shape, fp64; differentiable."""
    return -torch.expm1(-loss.double())


def power(miss: Tensor, gamma: float) -> Tensor:
    """``miss ** gamma`` whose derivative stays finite where nothing is missed and gamma is below 1; any shape."""
    return miss.clamp(min=torch.finfo(torch.float32).tiny) ** gamma


def sample_modulation(
    loss_BS: Tensor,
    supervision: Supervision,
    gamma: float,
    over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``(1 - P_j)^gamma`` of each token's sample.

    Args:
        loss_BS: token losses, floating point.
        supervision: of the micro-batch.
        gamma: at least 0.
        over_ranks: sums a tensor over the ranks that compute the tokens, each with losses of 0 for the others' tokens;
            differentiable. ``None`` where one rank has them all.

    Returns:
        fp64 [B, S], differentiable in ``loss_BS``; at unsupervised tokens the value of their sample, without meaning.
    """
    missed = supervision.sample_sums(token_miss(loss_BS))
    if over_ranks is not None:
        missed = over_ranks(missed)
    return spread(power(missed * supervision.inverse_sizes(), gamma), supervision.sample_ids_BS)


@dataclasses.dataclass(frozen=True)
class TaskStatistics:
    """``1 - P_i`` and ``Q_i`` of each task in the last global batch in which it appeared; fp64 [K].

    ``seen_K``: whether it has appeared at all, as 0 or 1.
    """

    miss_K: Tensor
    loss_K: Tensor
    seen_K: Tensor

    @classmethod
    def none(cls, num_tasks: int, device: torch.device | str = "cpu") -> "TaskStatistics":
        """The statistics before the first step: no task has appeared."""
        return cls(*torch.zeros(3, num_tasks, dtype=torch.float64, device=device))

    def after(self, miss_sum_K: Tensor, loss_sum_K: Tensor, samples_K: Tensor) -> "TaskStatistics":
        """Replace the statistics of the tasks that one more global batch has; the others keep theirs.

        Args:
            miss_sum_K: fp64, sum over the samples of each task of ``v_j`` times their mean miss.
            loss_sum_K: fp64, sum over the samples of each task of ``v_j`` times their mean loss.
            samples_K: ``M_i`` of the global batch, any dtype.
        """
        present_K, per_sample_K = samples_K > 0, inverse(samples_K.double())
        return TaskStatistics(
            torch.where(present_K, miss_sum_K * per_sample_K, self.miss_K),
            torch.where(present_K, loss_sum_K * per_sample_K, self.loss_K),
            torch.where(present_K, 1.0, self.seen_K),
        )


def task_modulation(before: TaskStatistics, gamma: float, detach: bool) -> tuple[Tensor, Tensor]:
    """Factors on ``Q_i`` and on ``P_i`` when Eq. 3 is differentiated at the last known statistics: fp64 [K] each.

    By the product rule, ``d[(1-P)^gamma Q] = (1-P)^gamma dQ - gamma (1-P)^(gamma-1) Q dP``. A task that appears for
    the first time has factor 1 and no second term; ``detach`` drops that term for all.
    """
    on_loss_K = torch.where(before.seen_K > 0, power(before.miss_K, gamma), 1.0)
    on_probability_K = -gamma * power(before.miss_K, gamma - 1) * before.loss_K * before.seen_K
    if detach or gamma == 0:
        on_probability_K = torch.zeros_like(on_probability_K)
    return on_loss_K, on_probability_K


def task_loss(factor_K: Tensor, now: TaskStatistics, samples_K: Tensor, gamma: float) -> Tensor:
    """Eq. 3 of each task on the statistics ``now``: fp64 [K]; their sum is the loss.

    Args:
        factor_K: fp64 from :meth:`.table.Loss.task_factors`; ``alpha_i / (|P| M_i)``.
        now: statistics of the same global batch.
        samples_K: ``M_i``, any dtype.
        gamma: at least 0.
    """
    return factor_K * samples_K * power(now.miss_K, gamma) * now.loss_K
