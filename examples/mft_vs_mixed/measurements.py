"""Measurements of one run, out of its metrics.jsonl and that of its probe.

Shapes: E evaluations, T logged steps, K tasks. A column is the validation loss of a task, one of ``SUMMARIES``, or one
of ``PROBED``.
"""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mft_megatron.errors import InputError

SUMMARIES = ("macro", "by tokens", "worst task")
# Columns that evaluate the model after its last step: on the training split the mean of the tasks' losses (Eq. 1) and
# the loss of the rarest task, and the loss of a task that no model was trained on.
TRAIN_MACRO, TRAIN_RAREST, UNSEEN = PROBED = ("train macro", "train rarest", "unseen task")
CLIP_GRAD = 1.0  # default of --clip-grad

Columns = dict[str, float]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """The measurements of one run.

    Attributes:
        tasks: K names.
        eval_step_E: steps of the evaluations.
        columns_E: their validation losses.
        weight_TK: weights as parts of their sum.
        share_TK: realised shares of the objective of each step, 0 where a task was absent.
        present_TK: whether the step had a supervised token of the task.
        run_share_K: realised shares of the objective of the whole run.
        clipped_T: whether the norm of the gradient was above ``CLIP_GRAD``.
        balance_share: part of a step's time that a balancer's draws took.
        probed: columns of ``PROBED`` of the final model.
    """

    tasks: tuple[str, ...]
    eval_step_E: np.ndarray
    columns_E: list[Columns]
    weight_TK: np.ndarray
    share_TK: np.ndarray
    present_TK: np.ndarray
    run_share_K: np.ndarray
    clipped_T: np.ndarray
    balance_share: float
    probed: Columns

    def columns(self) -> Columns:
        """The last evaluation and the probe."""
        return {**self.columns_E[-1], **self.probed}


def read_run(path: Path, probe: Path, unseen: str, rarest: str) -> Run:
    """Read the metrics.jsonl of one run, without evaluations before the first step, and that of its probe.

    Raises:
        InputError: there is none, or it has no evaluation or no logged step.
    """
    valid, train = _evaluations(path), [record for record in _read(path) if record["kind"] == "train"]
    if not train:
        raise _unreadable(path, "no logged step")
    tasks = tuple(valid[-1]["tasks"])

    def of_tasks(field: str) -> np.ndarray:
        return np.array([[record["tasks"][name][field] or 0.0 for name in tasks] for record in train])

    weight_TK = of_tasks("weight")
    return Run(
        tasks=tasks,
        eval_step_E=np.array([record["step"] for record in valid]),
        columns_E=[_columns(record["tasks"]) for record in valid],
        weight_TK=weight_TK / weight_TK.sum(1, keepdims=True),
        share_TK=of_tasks("share"),
        present_TK=of_tasks("supervised_tokens") > 0,
        run_share_K=of_tasks("run_share")[-1],
        balance_share=statistics.fmean(record.get("balance_share") or 0.0 for record in train),
        clipped_T=np.array([record["grad_norm"] > CLIP_GRAD for record in train]),
        probed=read_probe(probe, unseen, rarest),
    )


def read_single(paths: Mapping[str, Path]) -> Columns:
    """Read the last evaluation of the runs with one task each, by task, as that of one model."""
    tasks: dict[str, Record] = {}
    for task, path in paths.items():
        tasks[task] = _evaluations(path)[-1]["tasks"][task]
    return _columns(tasks)


def read_probe(path: Path, unseen: str, rarest: str) -> Columns:
    """Read the evaluation of a model on the training samples and on the unseen task."""
    losses = {name: task["loss"] for name, task in _evaluations(path, after=-1)[-1]["tasks"].items()}
    trained = [loss for name, loss in losses.items() if name != unseen]
    return {TRAIN_MACRO: statistics.fmean(trained), TRAIN_RAREST: losses[rarest], UNSEEN: losses[unseen]}


def _read(path: Path) -> list[Record]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        raise _unreadable(path, "not there") from None
    except ValueError as error:
        raise _unreadable(path, f"not JSON ({error})") from None


def _evaluations(path: Path, after: int = 0) -> list[Record]:
    """Evaluations after step ``after``, each with a loss of every task."""
    valid = [record for record in _read(path) if record["kind"] == "valid" and record["step"] > after]
    if not valid:
        raise _unreadable(path, "no evaluation")
    unknown = [name for name in valid[-1]["tasks"] if any(record["tasks"][name]["loss"] is None for record in valid)]
    if unknown:
        raise InputError(f"{path}: no validation loss of {', '.join(unknown)}; give every task validation samples")
    return valid


def _unreadable(path: Path, what: str) -> InputError:
    return InputError(f"{path}: {what}; remove the run's folder, so that it is run again")


def _columns(tasks: Mapping[str, Record]) -> Columns:
    losses = {name: task["loss"] for name, task in tasks.items()}
    tokens = {name: task["supervised_tokens"] for name, task in tasks.items()}
    return {
        **losses,
        "macro": statistics.fmean(losses.values()),
        "by tokens": sum(losses[name] * tokens[name] for name in losses) / sum(tokens.values()),
        "worst task": max(losses.values()),
    }
