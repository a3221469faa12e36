"""The objective of a step: one sum over the tokens of each micro-batch, for every ``--mft-loss`` (docs/LOSSES.md).

::

    T_i, M_i of the global batch or of an epoch, w_i ─► before_step ─► StepFactors [K] ─┐
    task, sample, mask and weights of each token, l_t ──────────────────────────────────┴─► contribution ─► Σ c_t·l_t
                                                                                              (+ Σ d_t·p_t, focal-task)

``before_step`` runs once a step and ``contribution`` once a micro-batch, where the output layer is. Nothing here knows
ranks: the sums of all micro-batches and data-parallel ranks are simply added.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from mft_megatron.batch import Batch

from .focal import TaskStatistics, sample_modulation, task_loss, task_modulation, token_miss
from .supervision import Supervision
from .table import LOSSES, Loss

# sums a tensor over the ranks that compute a micro-batch's tokens; differentiable
SumOverRanks = Callable[[Tensor], Tensor]
# rows of Objective.sums
SUMS = ("loss_K", "tokens_K", "token_weights_K", "objective_K", "share_K", "sample_loss_K", "sample_miss_K")


@dataclasses.dataclass(frozen=True)
class StepFactors:
    """Factors of each task that are known before the first backward of a step; fp64 [K] each.

    Attributes:
        base_K: ``a_i`` of :meth:`.table.Loss.task_factors`.
        loss_K: multiplies the token losses (before ``1/T_j``); differs from ``base_K`` in focal-task alone.
        weight_K: ``w_i`` or ``alpha_i``, from which micro-batch normalisation makes the ``a_i`` of each micro-batch.
        probability_K: multiplies ``p_t``; in focal-task alone.
        micro_batch_weight: 1 over the number of micro-batches of the step, for micro-batch normalisation.
    """

    base_K: Tensor
    loss_K: Tensor
    weight_K: Tensor
    probability_K: Tensor | None = None
    micro_batch_weight: float = 1.0

    def to(self, device: torch.device) -> "StepFactors":
        """Copy the factors to a device; the host does not wait for it."""

        def move(value_K: Tensor) -> Tensor:
            return value_K.to(device, non_blocking=True)

        return dataclasses.replace(
            self,
            base_K=move(self.base_K),
            loss_K=move(self.loss_K),
            weight_K=move(self.weight_K),
            probability_K=None if self.probability_K is None else move(self.probability_K),
        )


@dataclasses.dataclass(frozen=True)
class Slope:
    """``dL/dl_t`` of some tokens, as far as it is known before their losses: ``linear + exponential · exp(-l_t)``.

    Both are fp64 of one shape; ``exponential`` is ``None`` where there is no such term.
    """

    linear: Tensor
    exponential: Tensor | None = None

    def at(self, loss: Tensor) -> Tensor:
        """Evaluate ``dL/dl_t`` at token losses of the slope's shape; the result has their dtype."""
        if self.exponential is None:
            return self.linear.to(loss.dtype)
        return (self.linear + self.exponential * (-loss.double()).exp()).to(loss.dtype)

    def take(self, tokens: slice | Tensor) -> "Slope":
        """Select some of the tokens: a slice, or int64 indices, in the flattened order."""
        return self._each(lambda value: value.flatten()[tokens])

    def times(self, factor: Tensor | float) -> "Slope":
        """Scale the slope by a factor, a number or a scalar tensor."""
        return self._each(lambda value: value * factor)

    def _each(self, function: Callable[[Tensor], Tensor]) -> "Slope":
        return Slope(function(self.linear), None if self.exponential is None else function(self.exponential))


@dataclasses.dataclass(frozen=True)
class WeighedTokens:
    """Weights and coefficients of a micro-batch's tokens, computed once by :meth:`Objective.weigh`.

    Attributes:
        supervision: weights of the tokens.
        coefficient_BS: factors of the token losses, fp64, before focal-sample modulates them.
        on_probability_BS: factors of ``p_t``, fp64; in focal-task alone.
    """

    supervision: Supervision
    coefficient_BS: Tensor
    on_probability_BS: Tensor | None


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss and its constants.

    Attributes:
        mode: a name in :data:`.table.LOSSES`.
        gamma: exponent of the focal losses, at least 0.
        detach: whether the modulation of the focal losses is a constant.
        per_micro_batch: normalise inside each micro-batch and take the mean over micro-batches and ranks, as MFTCoder
            does.
    """

    mode: str = "task-token"
    gamma: float = 2.0
    detach: bool = False
    per_micro_batch: bool = False

    @property
    def loss(self) -> Loss:
        """The entry of the loss table."""
        return LOSSES[self.mode]

    def supervises(self, token_weights_K: Tensor, sample_weights_K: Tensor, weight_K: Tensor) -> bool:
        """Whether a global batch has a supervised token of a task with a weight; arguments as of :meth:`before_step`.

        They are on the host, and all are of the batch itself.
        """
        return bool(self.loss.task_factors(token_weights_K, sample_weights_K, weight_K).any())

    def before_step(
        self,
        token_weights_K: Tensor,
        sample_weights_K: Tensor,
        weight_K: Tensor,
        before: TaskStatistics,
        num_micro_batches: float = 1,
        num_batches: float = 1,
    ) -> StepFactors:
        """Compute the factors of a step.

        Args:
            token_weights_K: ``T_i`` of what the loss is normalised over, any dtype: the global batch, or an epoch.
            sample_weights_K: ``M_i`` of the same, any dtype.
            weight_K: ``w_i``, or ``alpha_i`` of the focal losses, floating point; 0 leaves a task out.
            before: statistics of earlier steps, which focal-task reads; ``loss_K`` and ``probability_K`` are then on
                their device, all else is on the device of the counts.
            num_micro_batches: of the whole step, over all ranks; where rows are empty, as many as the others fill.
            num_batches: how many global batches like that of the step ``T_i`` and ``M_i`` are of: for an epoch its
                packs divided by those of the step.
        """
        base_K = self.loss.task_factors(token_weights_K, sample_weights_K, weight_K)
        if num_batches != 1:
            base_K = base_K * num_batches
        factors = StepFactors(base_K, base_K, weight_K.double(), micro_batch_weight=1.0 / num_micro_batches)
        if not self.loss.modulates_tasks:
            return factors
        on_loss_K, on_probability_K = task_modulation(before, self.gamma, self.detach)
        moved_K = base_K.to(on_loss_K.device, non_blocking=True)
        return dataclasses.replace(factors, loss_K=moved_K * on_loss_K, probability_K=moved_K * on_probability_K)

    def weigh(self, factors: StepFactors, batch: Batch[Tensor]) -> WeighedTokens:
        """Compute what :meth:`slope`, :meth:`contribution` and :meth:`sums` of a micro-batch have in common.

        Args:
            factors: of the step, on the device of the micro-batch.
            batch: as tensors.
        """
        supervision = Supervision.of(batch)
        return WeighedTokens(supervision, *self._coefficients(factors, batch, supervision))

    def contribution(
        self,
        factors: StepFactors,
        batch: Batch[Tensor],
        loss_BS: Tensor,
        over_ranks: SumOverRanks | None = None,
        weighed: WeighedTokens | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute a micro-batch's part of the objective.

        Args:
            factors: of the step, on the device of the losses.
            batch: as tensors.
            loss_BS: token losses, fp32 or fp64, differentiable; 0 for tokens that another rank computes.
            over_ranks: sums a tensor over the ranks that compute the micro-batch's tokens, differentiably. Each of them
                gets the part of its tokens.
            weighed: of :meth:`weigh`, where it has been computed.

        Returns:
            the sum to differentiate, a scalar of the losses' dtype; and ``c_t`` fp64 [B, S], a constant, with which
            ``Σ c_t·l_t`` is the loss (of focal-task its linear part).
        """
        weighed = weighed or self.weigh(factors, batch)
        coefficient_BS = weighed.coefficient_BS
        if self.loss.modulates_samples:
            modulating_BS = loss_BS.detach() if self.detach else loss_BS
            modulation_BS = sample_modulation(modulating_BS, weighed.supervision, self.gamma, over_ranks)
            coefficient_BS = coefficient_BS * modulation_BS
        value = (coefficient_BS * loss_BS.double()).sum()
        if weighed.on_probability_BS is not None:
            # p_t = 1 - miss_t; the constant makes no difference to the gradient
            value = value - (weighed.on_probability_BS * token_miss(loss_BS)).sum()
        return value.to(loss_BS.dtype), coefficient_BS.detach()

    def slope(self, factors: StepFactors, batch: Batch[Tensor], weighed: WeighedTokens | None = None) -> Slope | None:
        """The gradient of :meth:`contribution` in the token losses, before they are known; [B, S].

        ``None`` for focal-sample, where the gradient of a token depends on the losses of its whole sample. Arguments as
        of :meth:`contribution`.
        """
        if self.loss.modulates_samples:
            return None
        weighed = weighed or self.weigh(factors, batch)
        on_probability_BS = weighed.on_probability_BS
        return Slope(weighed.coefficient_BS, None if on_probability_BS is None else -on_probability_BS)

    def sums(
        self,
        batch: Batch[Tensor],
        loss_BS: Tensor,
        coefficient_BS: Tensor,
        num_tasks: int,
        mine_BS: Tensor | None = None,
        weighed: WeighedTokens | None = None,
    ) -> Tensor:
        """Sum by task over a micro-batch's tokens all that the log and the next step need.

        Args:
            batch: as tensors.
            loss_BS: token losses, fp32 or fp64.
            coefficient_BS: ``c_t``, fp64, of :meth:`contribution`.
            num_tasks: ``K``.
            mine_BS: bool, the tokens to count, where several ranks compute a micro-batch; ``None`` for all.
            weighed: of :meth:`weigh`, where it has been computed.

        Returns:
            fp64 [len(SUMS), K]: ``v_j·u_t·l_t``, supervised tokens, ``v_j·u_t``, ``c_t·l_t``, ``c_t``; and for
            focal-task the sums over samples of ``v_j`` times their mean loss and mean miss, 0 otherwise.
        """
        loss_BS = loss_BS.detach().double()
        supervision = Supervision.of(batch) if weighed is None else weighed.supervision
        weights_BS = supervision.weights_BS
        rows = [
            loss_BS * weights_BS,
            supervision.mask_BS,
            weights_BS,
            coefficient_BS * loss_BS,
            coefficient_BS,
        ]
        if self.loss.modulates_tasks:
            one_K = torch.ones(num_tasks, dtype=torch.float64, device=loss_BS.device)
            once_BS = supervision.coefficients(one_K, sample_means=True)
            rows += [once_BS * loss_BS, once_BS * token_miss(loss_BS)]
        total = torch.zeros(len(SUMS), num_tasks, dtype=torch.float64, device=loss_BS.device)
        values = torch.stack(rows)
        if mine_BS is not None:
            values = values * mine_BS
        total[: len(rows)].index_add_(1, batch.task_ids_BS.flatten(), values.flatten(1))
        return total

    def statistics_after(self, before: TaskStatistics, sums: Tensor, samples_K: Tensor) -> TaskStatistics:
        """Update the statistics that the next step of focal-task uses; those of other losses stay as they are.

        Args:
            before: statistics of earlier steps.
            sums: of the step's global batch, fp64 [len(SUMS), K].
            samples_K: ``M_i`` of the step, any dtype, on any device.
        """
        if not self.loss.modulates_tasks:
            return before
        named = dict(zip(SUMS, sums, strict=True))
        moved_K = samples_K.to(sums.device, non_blocking=True)
        return before.after(named["sample_miss_K"], named["sample_loss_K"], moved_K)

    def by_task(self, factors: StepFactors, sums: Tensor, samples_K: Tensor) -> Tensor:
        """Each task's part of the reported loss: fp64 [K].

        ``Σ c_t·l_t``; of focal-task Eq. 3 on the global batch's statistics.

        Args:
            factors: of the step.
            sums: of the step's global batch, fp64 [len(SUMS), K].
            samples_K: ``M_i`` of the step, any dtype, on any device.
        """
        if not self.loss.modulates_tasks:
            return sums[SUMS.index("objective_K")]
        none = TaskStatistics.none(sums.shape[1], sums.device)
        now = self.statistics_after(none, sums, samples_K)
        base_K, moved_K = (value.to(sums.device, non_blocking=True) for value in (factors.base_K, samples_K))
        return task_loss(base_K, now, moved_K, self.gamma)

    def _coefficients(
        self, factors: StepFactors, batch: Batch[Tensor], supervision: Supervision
    ) -> tuple[Tensor, Tensor | None]:
        """Factors of the token losses, before focal-sample modulates them, and of ``p_t``: fp64 [B, S]."""
        factor_K = factors.loss_K
        if self.per_micro_batch:
            factor_K = self.loss.task_factors(*supervision.counts(len(factor_K)), factors.weight_K)
            factor_K = factor_K * (factors.micro_batch_weight * _filled(batch))
        coefficient_BS = supervision.coefficients(factor_K, self.loss.sample_means)
        if factors.probability_K is None:
            return coefficient_BS, None
        return coefficient_BS, supervision.coefficients(factors.probability_K, self.loss.sample_means)


def _filled(batch: Batch[Tensor]) -> Tensor | float:
    """The part of a micro-batch's rows that hold a pack; the others fill up the last step of a run of epochs."""
    return 1.0 if batch.lengths_B is None else (batch.lengths_B > 0).double().mean()
