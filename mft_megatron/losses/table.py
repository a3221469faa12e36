"""The losses of ``--mft-loss`` (docs/LOSSES.md §2, §3): a new linear loss is a function and a line of :data:`LOSSES`.

::

    T_i, M_i of the global batch or of an epoch, w_i ─► Loss.task_factors ─► a_i [K] ─► coefficients ─► c_t [B, S]

The sums come from the index, so ``c_t`` is known before the first backward of the step and does not depend on how the
batch is split into micro-batches. The focal losses start from such coefficients and modulate them (:mod:`.focal`).
"""

import dataclasses
from collections.abc import Callable

from torch import Tensor

from .segments import inverse

Factors = Callable[[Tensor, Tensor, Tensor], Tensor]


def _token(tokens_K: Tensor, samples_K: Tensor, weight_K: Tensor) -> Tensor:
    return inverse(tokens_K.sum()).expand_as(tokens_K)


def _sample(tokens_K: Tensor, samples_K: Tensor, weight_K: Tensor) -> Tensor:
    return inverse(samples_K.sum()).expand_as(samples_K)


def _task_token(tokens_K: Tensor, samples_K: Tensor, weight_K: Tensor) -> Tensor:
    return _balanced(weight_K, tokens_K)


def _task_sample(tokens_K: Tensor, samples_K: Tensor, weight_K: Tensor) -> Tensor:
    return _balanced(weight_K, samples_K)


def _focal(tokens_K: Tensor, samples_K: Tensor, alpha_K: Tensor) -> Tensor:
    # Eq. 2 and 3 divide by the number of tasks, where Eq. 1 divides by the sum of their weights
    present_K = (samples_K > 0) & (alpha_K > 0)
    return alpha_K * inverse(present_K.double().sum()) * inverse(samples_K)


def _balanced(weight_K: Tensor, count_K: Tensor) -> Tensor:
    weight_K = weight_K * (count_K > 0)
    return weight_K * inverse(weight_K.sum()) * inverse(count_K)


@dataclasses.dataclass(frozen=True)
class Loss:
    """One value of ``--mft-loss``: the factors of its tasks, and what it needs of a step.

    Attributes:
        factors: ``a_i``, fp64 [K], from ``T_i``, ``M_i`` and ``w_i`` (of the focal losses ``alpha_i``), fp64 [K] each.
        sample_means: whether the coefficient of a token is ``a_i / T_j``, so that samples of a task count equally.
        weighted: whether ``w_i`` are the tasks' target shares of the objective, from the options or a balancer.
        modulates_samples: whether each sample is multiplied by a power of its own losses (Eq. 2).
        modulates_tasks: whether each task is multiplied by a power of its losses in the step before (Eq. 3).
    """

    factors: Factors
    sample_means: bool = False
    weighted: bool = False
    modulates_samples: bool = False
    modulates_tasks: bool = False

    @property
    def focal(self) -> bool:
        """Whether losses modulate the coefficients; the weights of tasks are then ``alpha_i``."""
        return self.modulates_samples or self.modulates_tasks

    def task_factors(self, token_weights_K: Tensor, sample_weights_K: Tensor, weight_K: Tensor) -> Tensor:
        """The part of the coefficient that is the same for all tokens of a task, ``a_i``.

        Args:
            token_weights_K: ``T_i`` of what the loss is normalised over, any dtype.
            sample_weights_K: ``M_i`` of the same, any dtype.
            weight_K: ``w_i >= 0``, or ``alpha_i`` of a focal loss, floating point; 0 leaves a task out.

        Returns:
            fp64 [K]. All zero where nothing is supervised, or no task with a weight.
        """
        return self.factors(token_weights_K.double(), sample_weights_K.double(), weight_K.double())


LOSSES: dict[str, Loss] = {
    "token": Loss(_token),
    "sample": Loss(_sample, sample_means=True),
    "task-token": Loss(_task_token, weighted=True),
    "task-sample": Loss(_task_sample, sample_means=True, weighted=True),
    "focal-sample": Loss(_focal, sample_means=True, modulates_samples=True),
    "focal-task": Loss(_focal, sample_means=True, modulates_tasks=True),
}
