"""Lines for the start of a run: how often a task will be in a step, and what its weight then comes to."""

from collections.abc import Sequence

import numpy as np

from .coming_epoch import ComingEpoch

# of more tasks than these the rarest have a line each
LISTED_TASKS = 20
# a task that is in a smaller part of the steps loses much of its share where gradients are clipped
RARE = 0.1


def expectation_lines(epoch: ComingEpoch, names: Sequence[str], target_share_K: np.ndarray | None) -> list[str]:
    """One line for each task; of many tasks for the rarest, and one for the others.

    Args:
        epoch: the coming one.
        names: K names.
        target_share_K: fp64 [K], the tasks' targets; ``None`` where weights are none.
    """
    if len(names) <= LISTED_TASKS:
        return [_line(epoch, task, name, target_share_K) for task, name in enumerate(names)]
    rarest_first = np.argsort(epoch.presence_K, kind="stable")
    lines = [_line(epoch, int(task), names[task], target_share_K) for task in rarest_first[:LISTED_TASKS]]
    others_K = epoch.presence_K[rarest_first[LISTED_TASKS:]]
    at_least = "every step" if others_K[0] == 1 else f"at least {others_K[0]:.1%} of the steps"
    return [*lines, f"{len(others_K)} more task{'s' if len(others_K) > 1 else ''}: in {at_least}"]


def _line(epoch: ComingEpoch, task: int, name: str, target_share_K: np.ndarray | None) -> str:
    presence = epoch.presence_K[task]
    if not presence:
        return f"task {name}: nothing to train on"
    where = "every step" if presence == 1 else f"{presence:.1%} of the steps"
    if target_share_K is None:
        return f"task {name}: in {where}"
    if not target_share_K[task]:
        return f"task {name}: weight 0, in {where}"
    return (
        f"task {name}: target {target_share_K[task]:.1%}, in {where}; with global normalisation it realises "
        f"{epoch.global_share_K[task]:.1%}, with epoch {1 / presence:.3g} times its target there, "
        f"{epoch.largest_K[task]:.3g} at most"
    )


def clipping_warning(epoch: ComingEpoch, weight_K: np.ndarray, clip_grad: float) -> tuple[str, list[int]] | None:
    """The warning about rare tasks whose large steps are clipped under epoch normalisation, and these tasks.

    Args:
        epoch: the coming one.
        weight_K: fp64 [K], weights of the tasks.
        clip_grad: ``--clip-grad``; 0 for none.
    """
    rare = np.flatnonzero((epoch.presence_K > 0) & (epoch.presence_K < RARE) & (weight_K > 0)).tolist()
    if not rare or clip_grad <= 0:
        return None
    return (
        f"these tasks are in less than {RARE:.0%} of the steps, where epoch normalisation makes their gradients more "
        f"than {1 / RARE:g} times as large: --clip-grad {clip_grad:g} may scale these steps down, and the tasks' share "
        "with them; a larger --global-batch-size has them in more steps, a larger --clip-grad scales less down "
        "(grad_norm in metrics.jsonl is before clipping)",
        rare,
    )
