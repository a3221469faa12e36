"""Coefficients of tokens: every linear loss is ``L = Σ_t c_t · l_t`` (docs/LOSSES.md §2)."""

from torch import Tensor

from .segments import inverse, sample_sums, spread


def coefficients(
    factor_K: Tensor,
    task_ids_BS: Tensor,
    sample_ids_BS: Tensor,
    loss_mask_BS: Tensor,
    num_segments: int,
    sample_means: bool,
) -> Tensor:
    """``c_t`` of every token of a micro-batch.

    Args:
        factor_K: fp64 [K], ``a_i`` from :meth:`.table.Loss.task_factors`.
        task_ids_BS: int64; any valid task where nothing is supervised.
        sample_ids_BS: int64, index of the sample within the micro-batch, which holds the whole sample.
        loss_mask_BS: 1 where the target is supervised, any dtype.
        num_segments: how many sample indices there are; known on the host, so that nothing waits for the device.
        sample_means: whether ``a_i`` is divided by ``T_j``.

    Returns:
        fp64 [B, S], 0 for unsupervised tokens, constant in the parameters.
    """
    mask_BS = loss_mask_BS.double()
    coefficient_BS = spread(factor_K, task_ids_BS) * mask_BS
    if sample_means:
        tokens_of_sample = sample_sums(sample_ids_BS, mask_BS, num_segments)
        coefficient_BS = coefficient_BS * spread(inverse(tokens_of_sample), sample_ids_BS)
    return coefficient_BS
