"""Coefficients of the linear losses: every mode is ``L = Σ_t c_t · l_t`` (docs/LOSSES.md §2).

::

    T_i, M_i of the global batch, w_i ─► one factor per task  a_i  [K]      task_factors
    a_i, and 1/T_j where samples count equally ─► c_t         [B, S]        coefficients

The counts come from the step plan, so ``c_t`` is known before the first backward of the step and does not depend on how
the batch is cut. Modes are entries of :data:`FACTORS`; a new one is a function and a line. The focal losses start from
such coefficients, too, and modulate them (:mod:`.focal`).
"""

from collections.abc import Callable

from torch import Tensor

from .segments import inverse, sample_sums, spread

Factors = Callable[[Tensor, Tensor, Tensor], Tensor]


def _balanced(weight_K: Tensor, count_K: Tensor) -> Tensor:
    weight_K = weight_K * (count_K > 0)
    return weight_K * inverse(weight_K.sum()) * inverse(count_K)


def _token(tokens_K: Tensor, samples_K: Tensor, weight_K: Tensor) -> Tensor:
    return inverse(tokens_K.sum()).expand_as(tokens_K)


def _sample(tokens_K: Tensor, samples_K: Tensor, weight_K: Tensor) -> Tensor:
    return inverse(samples_K.sum()).expand_as(samples_K)


def _task_token(tokens_K: Tensor, samples_K: Tensor, weight_K: Tensor) -> Tensor:
    return _balanced(weight_K, tokens_K)


def _task_sample(tokens_K: Tensor, samples_K: Tensor, weight_K: Tensor) -> Tensor:
    return _balanced(weight_K, samples_K)


def _focal(tokens_K: Tensor, samples_K: Tensor, alpha_K: Tensor) -> Tensor:
    """Eq. 2 and 3 divide by the number of tasks, where Eq. 1 divides by the sum of their weights."""
    present_K = (samples_K > 0) & (alpha_K > 0)
    return alpha_K * inverse(present_K.double().sum()) * inverse(samples_K)


FACTORS: dict[str, Factors] = {
    "token": _token,
    "sample": _sample,
    "task-token": _task_token,
    "task-sample": _task_sample,
    "focal-sample": _focal,
    "focal-task": _focal,
}
SHARED_BY_SAMPLE = frozenset({"sample", "task-sample", "focal-sample", "focal-task"})


def task_factors(mode: str, supervised_tokens_K: Tensor, samples_K: Tensor, weight_K: Tensor) -> Tensor:
    """The part of the coefficient that is the same for all tokens of a task.

    Args:
        mode: a key of :data:`FACTORS`.
        supervised_tokens_K: ``T_i`` of the global batch, any dtype.
        samples_K: ``M_i`` of the global batch, any dtype.
        weight_K: ``w_i >= 0``, floating point; of the focal losses ``alpha_i``, 0 for a task that is left out.

    Returns:
        fp64 [K]: ``a_i``. The coefficient of a supervised token is ``a_i``, or ``a_i / T_j`` in the modes of
        :data:`SHARED_BY_SAMPLE`. All zero where the global batch supervises nothing, or no task with a weight.
    """
    return FACTORS[mode](supervised_tokens_K.double(), samples_K.double(), weight_K.double())


def coefficients(
    factor_K: Tensor,
    task_ids_BS: Tensor,
    sample_ids_BS: Tensor,
    loss_mask_BS: Tensor,
    num_segments: int,
    shared_by_sample: bool,
) -> Tensor:
    """``c_t`` of every token of a micro-batch.

    Args:
        factor_K: fp64 [K] from :func:`task_factors`.
        task_ids_BS: int64; any valid task where nothing is supervised.
        sample_ids_BS: int64, number of the sample within the micro-batch; a sample lies within it as a whole.
        loss_mask_BS: 1 where the target is supervised.
        num_segments: how many sample numbers there are; known on the host, so that nothing waits for the device.
        shared_by_sample: whether ``a_i`` is divided by ``T_j``.

    Returns:
        fp64 [B, S], 0 for unsupervised tokens, constant in the parameters.
    """
    mask_BS = loss_mask_BS.double()
    coefficient_BS = spread(factor_K, task_ids_BS) * mask_BS
    if shared_by_sample:
        tokens_of_sample = sample_sums(sample_ids_BS, mask_BS, num_segments)
        coefficient_BS = coefficient_BS * spread(inverse(tokens_of_sample), sample_ids_BS)
    return coefficient_BS
