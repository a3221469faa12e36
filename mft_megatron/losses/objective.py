"""The objective of a step: one sum over the tokens of each micro-batch, for every ``--mft-loss`` (docs/LOSSES.md).

::

    T_i, M_i of the global batch, w_i ─► before_step ─► StepFactors [K] ─┐
    task, sample and mask of every token, l_t ───────────────────────────┴─► of ─► Σ c_t·l_t (+ Σ d_t·p_t), c_t

``before_step`` runs once a step and ``of`` once a micro-batch, where the output layer is. Nothing here knows ranks: the
sums of all micro-batches and data-parallel ranks are simply added.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from mft_megatron.batch import Batch

from .coefficients import SHARED_BY_SAMPLE, coefficients, task_factors
from .focal import TaskStatistics, sample_modulation, task_loss, task_modulation, token_miss
from .segments import counts

OverRanks = Callable[[Tensor], Tensor]
# rows of Objective.sums
SUMS = ("loss_K", "tokens_K", "objective_K", "share_K", "sample_loss_K", "sample_miss_K")


@dataclasses.dataclass(frozen=True)
class StepFactors:
    """What is known before the first backward of a step; fp64 [K] each.

    ``base_K``: ``a_i`` of :func:`.coefficients.task_factors`. ``loss_K``: what a token loss is multiplied with (before
    ``1/T_j``); ``base_K`` but for focal-task. ``probability_K``: what ``p_t`` is multiplied with; of focal-task only.
    ``weight_K`` and ``micro_batch_share``: under micro-batch normalisation, which makes its own ``a_i``.
    """

    base_K: Tensor
    loss_K: Tensor
    weight_K: Tensor
    probability_K: Tensor | None = None
    micro_batch_share: float = 1.0

    def to(self, device: torch.device) -> "StepFactors":
        """The same on another device."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


@dataclasses.dataclass(frozen=True)
class Slope:
    """``dL/dl_t`` of some tokens, as far as it is known before their losses: ``linear + exponential · exp(-l_t)``.

    fp64; ``exponential`` is ``None`` where there is no such term.
    """

    linear: Tensor
    exponential: Tensor | None = None

    def at(self, loss: Tensor) -> Tensor:
        """``dL/dl_t`` at these losses, in their dtype."""
        if self.exponential is None:
            return self.linear.to(loss.dtype)
        return (self.linear + self.exponential * (-loss.double()).exp()).to(loss.dtype)

    def take(self, tokens: slice | Tensor) -> "Slope":
        """Of some of the tokens: a slice or their numbers in the flattened order."""
        return self._each(lambda value: value.flatten()[tokens])

    def times(self, factor: Tensor | float) -> "Slope":
        """Of the objective times a factor."""
        return self._each(lambda value: value * factor)

    def _each(self, function: Callable[[Tensor], Tensor]) -> "Slope":
        return Slope(function(self.linear), None if self.exponential is None else function(self.exponential))


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss and its constants.

    ``mode``: a key of :data:`.coefficients.FACTORS`. ``gamma``, ``detach``: of the focal losses. ``per_micro_batch``:
    normalise inside each micro-batch and take the mean over micro-batches and ranks, as MFTCoder does.
    """

    mode: str = "task-token"
    gamma: float = 2.0
    detach: bool = False
    per_micro_batch: bool = False

    def before_step(
        self,
        tokens_K: Tensor,
        samples_K: Tensor,
        weight_K: Tensor,
        before: TaskStatistics | None = None,
        num_micro_batches: int = 1,
    ) -> StepFactors:
        """Factors of a step.

        Args:
            tokens_K, samples_K: ``T_i`` and ``M_i`` of the global batch, any dtype.
            weight_K: ``w_i``, or ``alpha_i`` of the focal losses; 0 leaves a task out. Floating point.
            before: statistics of earlier steps, needed by focal-task; ``loss_K`` and ``probability_K`` then lie where
                they do, all else lies where the counts do.
            num_micro_batches: of the whole step, over all ranks.
        """
        base_K = task_factors(self.mode, tokens_K, samples_K, weight_K)
        factors = StepFactors(base_K, base_K, weight_K.double(), micro_batch_share=1.0 / num_micro_batches)
        if self.mode != "focal-task":
            return factors
        on_loss_K, on_probability_K = task_modulation(before, self.gamma, self.detach)
        there_K = base_K.to(on_loss_K.device, non_blocking=True)
        return dataclasses.replace(factors, loss_K=there_K * on_loss_K, probability_K=there_K * on_probability_K)

    def of(
        self, factors: StepFactors, batch: Batch, loss_BS: Tensor, over_ranks: OverRanks | None = None
    ) -> tuple[Tensor, Tensor]:
        """The part of the objective that a micro-batch contributes.

        Args:
            factors: of the step, on the device of the losses.
            batch: as tensors.
            loss_BS: token losses, fp32 or fp64, differentiable; 0 for tokens that another rank computes.
            over_ranks: sums a tensor over the ranks that share the micro-batch's tokens, differentiably. Each of them
                gets its own part of the objective.

        Returns:
            the sum to differentiate, a scalar of the losses' dtype; and ``c_t`` fp64 [B, S], a constant, with which
            ``Σ c_t·l_t`` is the loss (of focal-task its linear part).
        """
        coefficient_BS, on_probability_BS = self._coefficients(factors, batch)
        if self.mode == "focal-sample":
            seen_BS = loss_BS.detach() if self.detach else loss_BS
            place = (batch.sample_ids_BS, batch.loss_mask_BS, batch.num_segments)
            coefficient_BS = coefficient_BS * sample_modulation(seen_BS, *place, self.gamma, over_ranks)
        value = (coefficient_BS * loss_BS.double()).sum()
        if on_probability_BS is not None:
            # p_t = 1 - miss_t; the constant makes no difference to the gradient
            value = value - (on_probability_BS * token_miss(loss_BS)).sum()
        return value.to(loss_BS.dtype), coefficient_BS.detach()

    def slope(self, factors: StepFactors, batch: Batch) -> Slope | None:
        """The gradient of :meth:`of` in the token losses, before they are known; [B, S].

        ``None`` of focal-sample, where the gradient of a token depends on the losses of its whole sample.
        """
        if self.mode == "focal-sample":
            return None
        coefficient_BS, on_probability_BS = self._coefficients(factors, batch)
        return Slope(coefficient_BS, None if on_probability_BS is None else -on_probability_BS)

    def _coefficients(self, factors: StepFactors, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What the token losses are multiplied with, before the modulation of focal-sample, and what ``p_t`` is."""
        place = (batch.task_ids_BS, batch.sample_ids_BS, batch.loss_mask_BS, batch.num_segments)
        shared = self.mode in SHARED_BY_SAMPLE
        factor_K = factors.loss_K
        if self.per_micro_batch:
            own_counts = counts(*place, len(factor_K))
            factor_K = task_factors(self.mode, *own_counts, factors.weight_K) * factors.micro_batch_share
        coefficient_BS = coefficients(factor_K, *place, shared)
        if factors.probability_K is None:
            return coefficient_BS, None
        return coefficient_BS, coefficients(factors.probability_K, *place, shared)

    def sums(
        self, batch: Batch, loss_BS: Tensor, coefficient_BS: Tensor, num_tasks: int, mine_BS: Tensor | None = None
    ) -> Tensor:
        """What the log and the next step want to know of a micro-batch: fp64 [len(SUMS), K], sums over tokens by task.

        Token losses, supervised tokens, ``c_t·l_t``, ``c_t``; and for focal-task the sums over samples of their mean
        loss and mean miss, 0 otherwise. ``mine_BS``: which tokens count, where ranks share them; ``None`` for all.
        """
        loss_BS = loss_BS.detach().double()
        mask_BS = batch.loss_mask_BS.double()
        rows = [loss_BS * mask_BS, mask_BS, coefficient_BS * loss_BS, coefficient_BS]
        if self.mode == "focal-task":
            one_K = torch.ones(num_tasks, dtype=torch.float64, device=loss_BS.device)
            place = (batch.task_ids_BS, batch.sample_ids_BS, batch.loss_mask_BS, batch.num_segments)
            once_BS = coefficients(one_K, *place, shared_by_sample=True)
            rows += [once_BS * loss_BS, once_BS * token_miss(loss_BS)]
        total = torch.zeros(len(SUMS), num_tasks, dtype=torch.float64, device=loss_BS.device)
        values = torch.stack(rows)
        if mine_BS is not None:
            values = values * mine_BS
        total[: len(rows)].index_add_(1, batch.task_ids_BS.flatten(), values.flatten(1))
        return total

    def statistics_after(self, before: TaskStatistics, sums: Tensor, samples_K: Tensor) -> TaskStatistics:
        """Statistics that the next step of focal-task uses, from the global ``sums`` of this one; others have none.

        ``samples_K``: ``M_i`` of the step, on any device.
        """
        if self.mode != "focal-task":
            return before
        named = dict(zip(SUMS, sums, strict=True))
        there_K = samples_K.to(sums.device, non_blocking=True)
        return before.after(named["sample_miss_K"], named["sample_loss_K"], there_K)

    def by_task(self, factors: StepFactors, sums: Tensor, samples_K: Tensor) -> Tensor:
        """Each task's part of the reported loss, from the global ``sums``: fp64 [K].

        ``Σ c_t·l_t``; of focal-task Eq. 3 on the global batch's own statistics.
        """
        if self.mode != "focal-task":
            return sums[SUMS.index("objective_K")]
        none = TaskStatistics.none(sums.shape[1], sums.device)
        now = self.statistics_after(none, sums, samples_K)
        base_K, there_K = (value.to(sums.device, non_blocking=True) for value in (factors.base_K, samples_K))
        return task_loss(base_K, now, there_K, self.gamma)
