"""Slopes of loss curves, and weights for the tasks that a balancer's formula cannot judge.

Shape suffixes: H draws in a window, K tasks.
"""

import torch
from torch import Tensor


def slopes(loss_HK: Tensor) -> Tensor:
    """Least-squares slope of each column of fp64 [H, K] against the row's index: fp64 [K].

    Exactly 0 for a flat curve and for a single point: both axes are measured from the window's first point.
    """
    x_H = torch.arange(len(loss_HK), dtype=torch.float64)
    x_H -= x_H.mean()
    spread = x_H.square().sum()
    if not spread:
        return torch.zeros_like(loss_HK[0])
    return x_H @ (loss_HK - loss_HK[0]) / spread


def is_flat(loss_HK: Tensor) -> Tensor:
    """Whether every loss of a column of [H, K] equals its first: bool [K]."""
    return (loss_HK == loss_HK[0]).all(0)


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole of fp64 tensors that broadcast, and 0 where the whole is 0."""
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1.0), 0.0)


def append(history_HK: Tensor, value_K: Tensor, length: int) -> Tensor:
    """Copy a history, fp64 [H, K], with one more row, cut to its last ``length`` rows."""
    return torch.cat([history_HK, value_K[None]])[-length:].clone()


def uniform(num_tasks: int) -> Tensor:
    """The same weight for every task: fp64 [K], sum 1."""
    return torch.full((num_tasks,), 1.0 / max(num_tasks, 1), dtype=torch.float64)


def mean_for_others(weight: Tensor, took_part_K: Tensor) -> Tensor:
    """Extend the weights of some tasks to all tasks.

    Args:
        weight: fp64, one weight for each task that took part, in their order.
        took_part_K: bool [K].

    Returns:
        fp64 [K], sum 1: tasks that did not take part have the mean of the others; all the same where none took part.
    """
    if not took_part_K.any():
        return uniform(len(took_part_K))
    weight_K = weight.new_full(took_part_K.shape, weight.mean().item())
    weight_K[took_part_K] = weight
    return weight_K / weight_K.sum()
