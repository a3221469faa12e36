"""The five tasks of the demo, a sixth that no model is trained on, and the functions that no task has.

::

    standard library ─► functions ─┬─► TASK.jsonl             the demo's tasks, as large as it makes them
                                   ├─► body_to_signature.jsonl  the unseen task
                                   └─► functions.jsonl        every function that is left, as plain text for base models
    TASK.jsonl, its training samples ─► probe/TASK.jsonl      what final models are measured on, with the unseen task

Each function is assigned once, so the base model has not seen what the tasks are validated on.
"""

import random
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent / "demo"))

from make_tasks import TASKS, Function, Task, assign_functions, read_functions, read_modules, write_tasks

from mft_megatron.data.packing.splitting import assign_splits

FUNCTIONS = "functions"
UNSEEN = "body_to_signature"
TASK_NAMES = ("completion", "fim", "function_to_docstring", "docstring_to_function", "function_to_usage")
RAREST = TASK_NAMES[-1]
UNSEEN_SAMPLES = 300
LONGEST = 500  # characters of a sample, so that few are longer than a row; these are cut
LIBRARY = Path(sysconfig.get_paths()["stdlib"])
SEED = 1234  # of the assignment; the data are the same for all runs
SPLIT, SPLIT_SEED = (80.0, 20.0, 0.0), 1234  # of every task; the seed is the default of tools/preprocess_data.py


def make_text(function: Function, rng: random.Random) -> dict[str, Any]:
    """The function's source as a document."""
    return {"text": function.source}


def make_signature(function: Function, rng: random.Random) -> dict[str, Any] | None:
    """The body of a function without a docstring → its decorators and signature."""
    if function.docstring:
        return None
    body = "".join(function.lines[function.node.body[0].lineno - 1 :])
    request = rng.choice(["Write the signature of the function with this body.", "Which signature fits this body?"])
    return {
        "messages": [
            {"role": "user", "content": f"{request}\n\n```python\n{body.rstrip()}\n```"},
            {"role": "assistant", "content": f"```python\n{function.signature.rstrip()}\n```"},
        ]
    }


def write_samples(folder: Path, library: Path = LIBRARY, scale: float = 1.0) -> dict[str, int]:
    """Write one JSONL file for each task, one of plain functions, and in ``probe/`` the tasks' training samples.

    Args:
        folder: of the files.
        library: where the modules are.
        scale: multiplies every task's number of samples.

    Returns:
        how many records each file has.
    """
    functions = read_functions(read_modules(library), LONGEST)
    added = {UNSEEN: Task(make_signature, UNSEEN_SAMPLES), FUNCTIONS: Task(make_text, len(functions))}
    samples = {name: round(task.samples * scale) for name, task in (TASKS | added).items()}
    samples[FUNCTIONS] = len(functions)
    TASKS.update(added)  # the last task gets all remaining functions
    try:
        tasks = assign_functions(functions, samples, LONGEST, SEED)
    finally:
        for name in added:
            del TASKS[name]
    write_tasks(tasks, folder)
    write_tasks({name: training_records(name, tasks[name]) for name in TASK_NAMES}, folder / "probe")
    shutil.copyfile(folder / f"{UNSEEN}.jsonl", folder / "probe" / f"{UNSEEN}.jsonl")
    return {name: len(records) for name, records in tasks.items()}


def training_records(task: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records that preprocessing puts into the training split, if it keeps every record of the task."""
    split = assign_splits(len(records), SPLIT, SPLIT_SEED, task)
    return [records[index] for index in np.flatnonzero(split == 0)]
