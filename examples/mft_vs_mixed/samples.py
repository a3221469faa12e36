"""The five tasks of the demo, and the functions that no task has, as the text that base models are trained on.

::

    standard library ─► functions ─┬─► TASK.jsonl      the demo's tasks, as large as it makes them
                                   └─► functions.jsonl  every function that no task took, as plain text

Each function is assigned once, so the base model has not seen what the tasks are validated on.
"""

import random
import sys
import sysconfig
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "demo"))

from make_tasks import TASKS, Function, Task, assign_functions, read_functions, read_modules, write_tasks

FUNCTIONS = "functions"
TASK_NAMES = ("completion", "fim", "function_to_docstring", "docstring_to_function", "function_to_usage")
LONGEST = 500  # characters of a sample, so that it fits into a short pack
LIBRARY = Path(sysconfig.get_paths()["stdlib"])
SEED = 1234  # of the assignment; the data are the same for all runs


def make_text(function: Function, rng: random.Random) -> dict[str, Any]:
    """The function's source as a document."""
    return {"text": function.source}


def write_samples(folder: Path, library: Path = LIBRARY, scale: float = 1.0) -> dict[str, int]:
    """Write one JSONL file for each task and one of plain functions.

    Args:
        folder: of the files.
        library: where the modules are.
        scale: multiplies every task's number of samples.

    Returns:
        how many records each file has.
    """
    functions = read_functions(read_modules(library), LONGEST)
    samples = {name: round(task.samples * scale) for name, task in TASKS.items()} | {FUNCTIONS: len(functions)}
    TASKS[FUNCTIONS] = Task(make_text, len(functions))  # the last task gets all remaining functions
    try:
        tasks = assign_functions(functions, samples, LONGEST, SEED)
    finally:
        del TASKS[FUNCTIONS]
    write_tasks(tasks, folder)
    return {name: len(records) for name, records in tasks.items()}
