"""Sums over the tokens of each sample and of each task, by token-level ids: no loop, no wait for the device."""

import torch
from torch import Tensor


def inverse(values: Tensor) -> Tensor:
    """1/x of floating-point values of any shape, and 0 where x is 0: an absent task or sample has no coefficient."""
    return torch.where(values > 0, 1.0 / values.clamp(min=torch.finfo(values.dtype).tiny), 0.0)


def spread(value: Tensor, ids_BS: Tensor) -> Tensor:
    """The value of each token's sample or task: [B, S]; differentiable. Cheaper backward than ``value[ids_BS]``.

    Args:
        value: one value for each sample or task, any dtype.
        ids_BS: int32 or int64, indices into ``value``.
    """
    return value.index_select(0, ids_BS.flatten()).view(ids_BS.shape)


def sample_sums(sample_ids_BS: Tensor, value_BS: Tensor, num_segments: int) -> Tensor:
    """Sum of a per-token value over the tokens of each sample: fp64 [``num_segments``]; differentiable.

    Args:
        sample_ids_BS: int32 or int64, index of the sample within the micro-batch.
        value_BS: any dtype.
        num_segments: how many sample indices there are.
    """
    total = torch.zeros(num_segments, dtype=torch.float64, device=value_BS.device)
    return total.index_add(0, sample_ids_BS.flatten(), value_BS.double().flatten())


def task_sums(task_ids_BS: Tensor, value_BS: Tensor, num_tasks: int) -> Tensor:
    """Sum of a per-token value over the tokens of each task: fp64 [K]; a constant.

    Args:
        task_ids_BS: int32 or int64, index of the task.
        value_BS: any dtype.
        num_tasks: ``K``.
    """
    total_K = torch.zeros(num_tasks, dtype=torch.float64, device=value_BS.device)
    return total_K.index_add_(0, task_ids_BS.flatten(), value_BS.detach().double().flatten())
