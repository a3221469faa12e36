"""Numbers per task from the command line: ``--task-weights``, ``--focal-alpha``, ``--famo-min-losses``."""

import json
from collections.abc import Sequence

import numpy as np

from mft_megatron.arguments.groups.multi_task import MultiTaskArguments
from mft_megatron.errors import InputError
from mft_megatron.losses.table import LOSSES
from mft_megatron.suggestions import did_you_mean

# more tasks than these are not listed in a message
LISTED_TASKS = 20


def initial_weights(
    options: MultiTaskArguments, task_names: Sequence[str], of_data: Sequence[float | None] | None = None
) -> np.ndarray:
    """``w_i`` before the first draw of a balancer, or ``alpha_i`` of the focal losses: fp64 [K].

    Args:
        options: of the command line.
        task_names: K names.
        of_data: K weights that the data set has from its task file, each ``None`` where it has none; they hold for
            tasks that ``--task-weights`` does not name.

    Raises:
        InputError: as :func:`task_numbers`; a negative weight, no weight above 0, an alpha that is not above 0.
    """
    loss = LOSSES[options.mft_loss]
    if loss.focal:
        alpha_K = task_numbers("--focal-alpha", options.focal_alpha, task_names, default=1.0)
        if (alpha_K <= 0).any():
            raise InputError(f"--focal-alpha: numbers must be above 0, not {alpha_K.tolist()}")
        return alpha_K
    default_K = np.ones(len(task_names))
    if of_data is not None and loss.weighted:
        default_K[:] = [1.0 if weight is None else weight for weight in of_data]
    weight_K = task_numbers("--task-weights", options.task_weights, task_names, default_K)
    if (weight_K < 0).any():
        raise InputError(f"--task-weights: weights must not be negative, not {weight_K.tolist()}")
    if not weight_K.any():
        raise InputError("--task-weights: at least one task needs a weight above 0")
    return weight_K


def data_weights_text(
    options: MultiTaskArguments, task_names: Sequence[str], of_data: Sequence[float | None]
) -> str | None:
    """A line for the log about the weights that the data set has from a task file; ``None`` where it has none."""
    given = {name: weight for name, weight in zip(task_names, of_data, strict=True) if weight is not None}
    if not given:
        return None
    words = ", ".join(f"{name}={weight:g}" for name, weight in given.items())
    if not LOSSES[options.mft_loss].weighted:
        return f"task weights of the data set are not used, --mft-loss {options.mft_loss} takes none: {words}"
    if options.task_balance != "static":
        return f"task weights of the data set are not used, --task-balance {options.task_balance} sets them: {words}"
    weight_K = initial_weights(options, task_names, of_data)
    changed = [name for name, weight in given.items() if weight_K[task_names.index(name)] != weight]
    but = f"; --task-weights changes {', '.join(changed)}" if changed else ""
    return f"task weights of the data set: {words}{but}"


def task_numbers(
    option: str, given: Sequence[str] | None, task_names: Sequence[str], default: float | np.ndarray
) -> np.ndarray:
    """Read one finite number for each task.

    Args:
        option: its name, for messages.
        given: ``name=number`` each, or a single ``[1.0, 2.0, …]`` in the data set's order of tasks; ``None`` for none.
        task_names: K names.
        default: for tasks that are not named; one number, or fp64 [K].

    Returns:
        fp64 [K].

    Raises:
        InputError: an unknown or repeated task, a malformed or infinite number, a list of the wrong length.
    """
    number_K = np.full(len(task_names), default, np.float64)
    given = given or ()
    listed = _number_list(given[0]) if len(given) == 1 else None
    if listed is not None:
        if len(listed) != len(task_names):
            raise InputError(f"{option}: {len(listed)} numbers for {len(task_names)} tasks ({', '.join(task_names)})")
        number_K[:] = listed
    else:
        seen = set()
        for word in given:
            name, equals, text = word.rpartition("=")
            if not equals or name not in task_names:
                raise InputError(f"{option} {word}: give NAME=NUMBER with {_known_tasks(name, task_names)}")
            if name in seen:
                raise InputError(f"{option}: task {name} is given twice")
            seen.add(name)
            number_K[task_names.index(name)] = _number(option, word, text)
    with np.errstate(over="ignore"):
        if not np.isfinite(number_K.sum()):
            raise InputError(f"{option}: numbers and their sum must be finite, not {number_K.tolist()}")
    return number_K


def _known_tasks(name: str, task_names: Sequence[str]) -> str:
    """The tasks of the data set, or of many the one that was probably meant."""
    if len(task_names) <= LISTED_TASKS:
        return f"a task of: {', '.join(task_names)}"
    return "; ".join(filter(None, [f"one of the data set's {len(task_names)} tasks", did_you_mean(name, task_names)]))


def _number(option: str, word: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{option} {word}: {text!r} is not a number") from None


def _number_list(text: str) -> list[float] | None:
    """Read ``[1, 2.5]``, MFTCoder's way to give weights; ``None`` for anything but a list.

    Raises:
        InputError: a list of something else.
    """
    try:
        values = json.loads(text)
    except ValueError:
        return None
    if not isinstance(values, list):
        return None
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{text}: {json.dumps(value)} is not a number")
    return [float(value) for value in values]
