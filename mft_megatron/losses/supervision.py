"""The weight of every token of a micro-batch in the objective, and the task and sample that it belongs to.

::

    loss mask, turn weights u_t, sample weights v_j ─► Supervision ─┬─► T_j = Σ u_t of a sample
                                                                    ├─► T_i = Σ v_j·u_t and M_i = Σ v_j of a task
                                                                    └─► coefficients c_t
"""

import dataclasses

from torch import Tensor

from mft_megatron.batch import Batch

from .segments import inverse, sample_sums, spread, task_sums


@dataclasses.dataclass(frozen=True)
class Supervision:
    """Weights of the tokens of a micro-batch, fp64 [B, S] and constant; without any, all three are the loss mask.

    Attributes:
        task_ids_BS: int32 or int64; any valid task where nothing is supervised.
        sample_ids_BS: int32 or int64, index of the sample within the micro-batch, which holds the whole sample.
        num_segments: how many sample indices there are; known on the host, so that nothing waits for the device.
        mask_BS: 1 where the token is supervised, else 0.
        turn_weights_BS: ``u_t``; 0 where the token is not supervised.
        weights_BS: ``v_j·u_t``.
    """

    task_ids_BS: Tensor
    sample_ids_BS: Tensor
    num_segments: int
    mask_BS: Tensor
    turn_weights_BS: Tensor
    weights_BS: Tensor

    @classmethod
    def of(cls, batch: Batch[Tensor]) -> "Supervision":
        """Read it from a micro-batch of tensors."""
        turn_weights_BS = mask_BS = batch.loss_mask_BS.double()
        if batch.token_weights_BS is not None:
            turn_weights_BS = turn_weights_BS * batch.token_weights_BS
        weights_BS = turn_weights_BS
        if batch.sample_weights_BS is not None:
            weights_BS = weights_BS * batch.sample_weights_BS
        ids = (batch.task_ids_BS, batch.sample_ids_BS, batch.num_segments)
        return cls(*ids, mask_BS, turn_weights_BS, weights_BS)

    def sample_sums(self, value_BS: Tensor) -> Tensor:
        """Sum of ``u_t`` times a per-token value over each sample: fp64 [samples]; differentiable."""
        return sample_sums(self.sample_ids_BS, self.turn_weights_BS * value_BS, self.num_segments)

    def inverse_sizes(self) -> Tensor:
        """``1 / T_j`` of each sample, fp64 [samples]; 0 where nothing is supervised."""
        return inverse(sample_sums(self.sample_ids_BS, self.turn_weights_BS, self.num_segments))

    def coefficients(self, factor_K: Tensor, sample_means: bool) -> Tensor:
        """``c_t`` of every token: every linear loss is ``L = Σ_t c_t · l_t`` (docs/LOSSES.md §2).

        Args:
            factor_K: fp64 [K], ``a_i`` from :meth:`.table.Loss.task_factors`.
            sample_means: whether ``a_i`` is divided by ``T_j``.

        Returns:
            fp64 [B, S], 0 for unsupervised tokens, constant in the parameters.
        """
        coefficient_BS = spread(factor_K, self.task_ids_BS) * self.weights_BS
        if sample_means:
            coefficient_BS = coefficient_BS * spread(self.inverse_sizes(), self.sample_ids_BS)
        return coefficient_BS

    def counts(self, num_tasks: int) -> tuple[Tensor, Tensor]:
        """``T_i`` and ``M_i`` of these rows alone, fp64 [K] each, for ``num_tasks`` tasks."""
        # a sample counts once, spread over its supervised tokens
        once_BS = self.weights_BS * spread(self.inverse_sizes(), self.sample_ids_BS)
        ids_BS = self.task_ids_BS
        return task_sums(ids_BS, self.weights_BS, num_tasks), task_sums(ids_BS, once_BS, num_tasks)
