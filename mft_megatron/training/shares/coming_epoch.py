"""The tasks in the steps of an epoch, counted before any step: a pure function of the order of the packs.

::

    order of the packs, G a step ─► packs of each step ─► (step, task) pairs with T_i or M_i ─► presence, shares, spikes
"""

import dataclasses

import numpy as np

from mft_megatron.data.loading.dataset import PackedSplit

from .account import divisors

# packs that are counted at a time
PACKS_AT_ONCE = 1 << 20


@dataclasses.dataclass(frozen=True)
class ComingEpoch:
    """Tasks in the steps of an epoch, as if its first step began with it. Steps weigh by their packs.

    Attributes:
        presence_K: fp64 [K], part of the steps that have the task.
        global_share_K: fp64 [K], share of the objective with global normalisation, ``w_i / W`` over the tasks of each
            step; all 0 if no task has a weight.
        largest_K: fp64 [K], with epoch normalisation the largest share that a step gives to a task, as a multiple of
            its target; in the mean over the steps that have the task it is ``1 / presence_K``. 0 for a task without
            training data. The last step counts like the others, without what the next epoch fills it up with.
    """

    presence_K: np.ndarray
    global_share_K: np.ndarray
    largest_K: np.ndarray


def count_epoch(
    split: PackedSplit, order: np.ndarray, global_batch_size: int, weight_K: np.ndarray, by_samples: bool
) -> ComingEpoch:
    """Count the tasks of each step.

    Args:
        split: of the packs.
        order: int64 [packs], the epoch's.
        global_batch_size: packs of a step.
        weight_K: fp64 [K], ``w_i``.
        by_samples: whether a task is normalised by ``M_i``, else by ``T_i``.
    """
    num_packs, num_tasks = len(order), split.num_tasks
    packs_of_step = min(global_batch_size, num_packs)
    present_K, mass_K, most_K = np.zeros(num_tasks), np.zeros(num_tasks), np.zeros(num_tasks)
    at_once = max(PACKS_AT_ONCE // packs_of_step, 1) * packs_of_step
    for start in range(0, num_packs, at_once):
        packs = order[start : start + at_once]
        step_of_pack = np.arange(len(packs)) // packs_of_step
        size_S = np.bincount(step_of_pack)
        task_N, step_N, count_N = _tasks_of_steps(split, packs, step_of_pack, by_samples)
        weight_S = np.bincount(step_N, weight_K[task_N], len(size_S))
        part_S = np.divide(size_S, weight_S, out=np.zeros(len(size_S)), where=weight_S > 0)
        present_K += np.bincount(task_N, size_S[step_N], num_tasks)
        mass_K += np.bincount(task_N, weight_K[task_N] * part_S[step_N], num_tasks)
        np.maximum.at(most_K, task_N, count_N)
    mean_K = divisors(split.totals, by_samples) * packs_of_step / num_packs
    return ComingEpoch(
        present_K / num_packs,
        mass_K / mass_K.sum() if mass_K.any() else mass_K,
        np.divide(most_K, mean_K, out=np.zeros(num_tasks), where=mean_K > 0),
    )


def _tasks_of_steps(
    split: PackedSplit, packs: np.ndarray, step_of_pack: np.ndarray, by_samples: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs of a step and a task that the step has, sorted by task, then step.

    Returns:
        task_N, step_N: int64.
        count_N: fp64, ``T_i`` or ``M_i`` of the step.
    """
    entries = split.entries(packs)
    step_E = np.repeat(step_of_pack, entries.numbers)
    count_E = entries.sample_weights_E if by_samples else entries.token_weights_E
    kept = np.flatnonzero(count_E > 0)
    # tasks are small numbers: a stable sort of 16 bits is by radix, and keeps the order of the steps
    kept = kept[np.argsort(entries.tasks_E[kept].astype(np.uint16), kind="stable")]
    task_E, step_E, count_E = entries.tasks_E[kept], step_E[kept], count_E[kept]
    first = np.flatnonzero((np.diff(task_E, prepend=-1) != 0) | (np.diff(step_E, prepend=-1) != 0))
    return task_E[first], step_E[first], np.add.reduceat(count_E, first) if len(first) else count_E
