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
        ids_BS: int64, indices into ``value``.
    """
    return value.index_select(0, ids_BS.flatten()).view(ids_BS.shape)


def sample_sums(sample_ids_BS: Tensor, value_BS: Tensor, num_segments: int) -> Tensor:
    """Sum of a per-token value over the tokens of each sample: fp64 [``num_segments``]; differentiable.

    Args:
        sample_ids_BS: int64, index of the sample within the micro-batch.
        value_BS: any dtype.
        num_segments: how many sample indices there are.
    """
    total = torch.zeros(num_segments, dtype=torch.float64, device=value_BS.device)
    return total.index_add(0, sample_ids_BS.flatten(), value_BS.double().flatten())


def task_sums(task_ids_BS: Tensor, value_BS: Tensor, num_tasks: int) -> Tensor:
    """Sum of a per-token value over the tokens of each task: fp64 [K]; a constant.

    Args:
        task_ids_BS: int64, index of the task.
        value_BS: any dtype.
        num_tasks: ``K``.
    """
    total_K = torch.zeros(num_tasks, dtype=torch.float64, device=value_BS.device)
    return total_K.index_add_(0, task_ids_BS.flatten(), value_BS.detach().double().flatten())


def counts(
    task_ids_BS: Tensor, sample_ids_BS: Tensor, loss_mask_BS: Tensor, num_segments: int, num_tasks: int
) -> tuple[Tensor, Tensor]:
    """Supervised tokens of each task in these rows, and its samples that have any: fp64 [K] each.

    Args:
        task_ids_BS: int64, index of the task.
        sample_ids_BS: int64, index of the sample; these rows hold the whole sample.
        loss_mask_BS: 1 where the target is supervised, any dtype.
        num_segments: how many sample indices there are; known on the host.
        num_tasks: ``K``.
    """
    mask_BS = loss_mask_BS.double()
    # a sample counts once, spread over its supervised tokens
    once_BS = mask_BS * spread(inverse(sample_sums(sample_ids_BS, mask_BS, num_segments)), sample_ids_BS)
    return task_sums(task_ids_BS, mask_BS, num_tasks), task_sums(task_ids_BS, once_BS, num_tasks)
