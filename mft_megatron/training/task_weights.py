"""``--task-weights`` for the tasks of a data set."""

from collections.abc import Sequence

import numpy as np

from mft_megatron.errors import InputError
from mft_megatron.options import number_list


def task_weights(options: Sequence[str] | None, task_names: Sequence[str]) -> np.ndarray:
    """Weight of each task, fp64 [K].

    Args:
        options: ``name=number`` each (1 where a task is not named), or a single ``[1.0, 2.0, …]`` in the data set's
            order of tasks; ``None`` for 1 everywhere.
        task_names: K names.

    Raises:
        InputError: an unknown or repeated task, a malformed or negative number, a list of the wrong length, no weight
            above 0.
    """
    weight_K = np.ones(len(task_names))
    options = options or ()
    listed = number_list(options[0]) if len(options) == 1 else None
    if listed is not None:
        if len(listed) != len(task_names):
            raise InputError(
                f"--task-weights: {len(listed)} numbers for {len(task_names)} tasks ({', '.join(task_names)})"
            )
        weight_K[:] = listed
    else:
        seen = set()
        for option in options:
            name, equals, text = option.rpartition("=")
            if not equals or name not in task_names:
                raise InputError(f"--task-weights {option}: give NAME=NUMBER with a task of: {', '.join(task_names)}")
            if name in seen:
                raise InputError(f"--task-weights: task {name} is given twice")
            seen.add(name)
            weight_K[task_names.index(name)] = _number(option, text)
    if not np.isfinite(weight_K).all() or (weight_K < 0).any():
        raise InputError(f"--task-weights: weights must be finite and not negative, not {weight_K.tolist()}")
    if not weight_K.any():
        raise InputError("--task-weights: at least one task needs a weight above 0")
    return weight_K


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--task-weights {option}: {text!r} is not a number") from None
