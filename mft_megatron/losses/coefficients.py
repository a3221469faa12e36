"""Coefficients of the linear losses: every mode is ``L = Σ_t c_t · l_t`` (docs/LOSSES.md §2).

::

    T_i, M_i of the global batch, w_i ─► one factor per task  a_i  [K]      task_factors
    a_i, and 1/T_j where samples count equally ─► c_t         [B, S]        coefficients

The counts come from the step plan, so ``c_t`` is known before the first backward of the step and does not depend on how
the batch is cut. Modes are entries of :data:`FACTORS`; a new one is a function and a line.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Factors = Callable[[Tensor, Tensor, Tensor], Tensor]


def _inverse(numbers: Tensor) -> Tensor:
    """1/x, and 0 where x is 0: what is absent has no coefficient."""
    return torch.where(numbers > 0, 1.0 / numbers.clamp(min=torch.finfo(numbers.dtype).tiny), 0.0)


def _balanced(present: Tensor, weight_K: Tensor, count_K: Tensor) -> Tensor:
    weight = torch.where(present, weight_K, 0.0)
    return weight * _inverse(weight.sum()) * _inverse(count_K)


def _token(tokens_K: Tensor, samples_K: Tensor, weight_K: Tensor) -> Tensor:
    return _inverse(tokens_K.sum()).expand_as(tokens_K)


def _sample(tokens_K: Tensor, samples_K: Tensor, weight_K: Tensor) -> Tensor:
    return _inverse(samples_K.sum()).expand_as(samples_K)


def _task_token(tokens_K: Tensor, samples_K: Tensor, weight_K: Tensor) -> Tensor:
    return _balanced(tokens_K > 0, weight_K, tokens_K)


def _task_sample(tokens_K: Tensor, samples_K: Tensor, weight_K: Tensor) -> Tensor:
    return _balanced(tokens_K > 0, weight_K, samples_K)


FACTORS: dict[str, Factors] = {
    "token": _token,
    "sample": _sample,
    "task-token": _task_token,
    "task-sample": _task_sample,
}
SHARED_BY_SAMPLE = frozenset({"sample", "task-sample"})


def task_factors(mode: str, supervised_tokens_K: Tensor, samples_K: Tensor, weight_K: Tensor) -> Tensor:
    """The part of the coefficient that is the same for all tokens of a task.

    Args:
        mode: a key of :data:`FACTORS`.
        supervised_tokens_K: ``T_i`` of the global batch, any dtype.
        samples_K: ``M_i`` of the global batch, any dtype.
        weight_K: ``w_i >= 0``, floating point.

    Returns:
        fp64 [K]: ``a_i``. The coefficient of a supervised token is ``a_i``, or ``a_i / T_j`` in the modes of
        :data:`SHARED_BY_SAMPLE`. All zero where the global batch supervises nothing, or no task with a weight.
    """
    return FACTORS[mode](supervised_tokens_K.double(), samples_K.double(), weight_K.double())


def coefficients(
    mode: str,
    factor_K: Tensor,
    task_ids_BS: Tensor,
    sample_ids_BS: Tensor,
    loss_mask_BS: Tensor,
    num_segments: int,
) -> Tensor:
    """``c_t`` of every token of a micro-batch.

    Args:
        mode: a key of :data:`FACTORS`.
        factor_K: fp64 [K] from :func:`task_factors`.
        task_ids_BS: int64; any valid task where nothing is supervised.
        sample_ids_BS: int64, number of the sample within the micro-batch; a sample lies within it as a whole.
        loss_mask_BS: 1 where the target is supervised.
        num_segments: how many sample numbers there are; known on the host, so that nothing waits for the device.

    Returns:
        fp32 [B, S], 0 for unsupervised tokens, constant in the parameters.
    """
    mask_BS = loss_mask_BS.double()
    coefficient_BS = factor_K[task_ids_BS] * mask_BS
    if mode in SHARED_BY_SAMPLE:
        tokens_of_sample = torch.zeros(num_segments, dtype=torch.float64, device=mask_BS.device)
        tokens_of_sample.index_add_(0, sample_ids_BS.flatten(), mask_BS.flatten())
        coefficient_BS = coefficient_BS * _inverse(tokens_of_sample)[sample_ids_BS]
    return coefficient_BS.float()


def task_sums(task_ids_BS: Tensor, value_BS: Tensor, num_tasks: int) -> Tensor:
    """Sum of a per-token value over the tokens of each task, accumulated in fp64: [K]."""
    total_K = torch.zeros(num_tasks, dtype=torch.float64, device=value_BS.device)
    return total_K.index_add_(0, task_ids_BS.flatten(), value_BS.detach().double().flatten())
