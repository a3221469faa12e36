"""From the runs' metrics.jsonl to the numbers of the table.

::

    metrics.jsonl ─read_run─► Run ─final, best─► one number per column ─┬─ over seeds ─► Spread (mean, std)
                                                                        └─ seed by seed against another method
                                                                                       ─► Difference (mean, 95 %)

Shapes: E evaluations, T logged steps, K tasks. A column is a task, or one of ``SUMMARIES``.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mft_megatron.errors import InputError

SUMMARIES = ("macro", "by tokens", "worst task")
# Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom; beyond the list its last one, which is larger.
STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

Columns = dict[str, float]


@dataclass(frozen=True)
class Run:
    """The measurements of one run.

    ``weight_TK``: weights as parts of their sum. ``share_TK``: realised shares of the objective, 0 where a task was
    absent. ``balance_share``: part of a step's time that a balancer's draws took.
    """

    tasks: tuple[str, ...]
    eval_step_E: np.ndarray
    columns_E: list[Columns]
    weight_TK: np.ndarray
    share_TK: np.ndarray
    balance_share: float

    def final(self) -> Columns:
        """The last evaluation."""
        return self.columns_E[-1]

    def best(self) -> Columns:
        """The smallest value that each column ever had; not all at the same step."""
        return {name: min(columns[name] for columns in self.columns_E) for name in self.columns_E[0]}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of several seeds; ``std`` is None for a single value."""

    mean: float
    std: float | None


@dataclass(frozen=True)
class Difference:
    """Mean of the differences seed by seed. ``half_width`` is that of its 95 % interval; None for a single seed."""

    mean: float
    standard_error: float | None
    half_width: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def read_run(path: Path) -> Run:
    """Read one metrics.jsonl; evaluations before the first step are left out.

    Raises:
        InputError: there is none, or it has no evaluation or no logged step.
    """
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        raise InputError(f"{path}: not there; remove the run's folder, so that it is run again") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); remove the run's folder, so that it is run again") from None
    valid = [record for record in records if record["kind"] == "valid" and record["step"] > 0]
    train = [record for record in records if record["kind"] == "train"]
    if not valid or not train:
        raise InputError(
            f"{path}: {len(train)} logged steps and {len(valid)} evaluations; remove the run's folder, so that it is "
            "run again"
        )
    tasks = tuple(valid[-1]["tasks"])
    unknown = [name for name in tasks if any(record["tasks"][name]["loss"] is None for record in valid)]
    if unknown:
        raise InputError(f"{path}: no validation loss of {', '.join(unknown)}; give every task validation samples")

    def of_tasks(field: str) -> np.ndarray:
        return np.array([[record["tasks"][name][field] or 0.0 for name in tasks] for record in train])

    weight_TK = of_tasks("weight")
    return Run(
        tasks=tasks,
        eval_step_E=np.array([record["step"] for record in valid]),
        columns_E=[_columns(record) for record in valid],
        weight_TK=weight_TK / weight_TK.sum(1, keepdims=True),
        share_TK=of_tasks("share"),
        balance_share=statistics.fmean(record.get("balance_share") or 0.0 for record in train),
    )


def _columns(record: Mapping) -> Columns:
    losses = {name: task["loss"] for name, task in record["tasks"].items()}
    return {
        **losses,
        "macro": record["macro_loss"],
        "by tokens": record["token_loss"],
        "worst task": max(losses.values()),
    }


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of one value per seed."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def paired(values: Sequence[float], others: Sequence[float]) -> Difference:
    """``values`` minus ``others``, both in the order of the seeds."""
    differences = [value - other for value, other in zip(values, others, strict=True)]
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return Difference(mean, None, None)
    error = statistics.stdev(differences) / math.sqrt(count)
    return Difference(mean, error, error * STUDENT_95[min(count - 1, len(STUDENT_95)) - 1])


@dataclass(frozen=True)
class Comparison:
    """All runs: method → its runs, in the order of the seeds."""

    runs: Mapping[str, Sequence[Run]]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return next(iter(self.runs.values()))[0].tasks

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns: tasks, then summaries."""
        return (*self.tasks, *SUMMARIES)

    def values(self, method: str, column: str, which: str = "final") -> list[float]:
        """One value per seed; ``which`` is final or best."""
        return [getattr(run, which)()[column] for run in self.runs[method]]

    def spread(self, method: str, column: str, which: str = "final") -> Spread:
        """Mean and standard deviation of a column over the seeds."""
        return spread(self.values(method, column, which))

    def paired(self, method: str, other: str, column: str, which: str = "final") -> Difference:
        """A method minus another one, seed by seed."""
        return paired(self.values(method, column, which), self.values(other, column, which))

    def winner(self, column: str, which: str = "final") -> str | None:
        """The method with the smallest mean, if it is clearly smaller than the next one, seed by seed."""
        first, second = sorted(self.runs, key=lambda method: self.spread(method, column, which).mean)[:2]
        return first if self.paired(first, second, column, which).is_clear else None

    def mean_share(self, method: str) -> Columns:
        """Realised share of each task, over all steps and seeds."""
        return self._by_task([run.share_TK.mean(0) for run in self.runs[method]])

    def last_weight(self, method: str) -> Columns:
        """Weight of each task, over the last tenth of the steps and all seeds."""
        last = [run.weight_TK[-max(1, len(run.weight_TK) // 10) :] for run in self.runs[method]]
        return self._by_task([weight_TK.mean(0) for weight_TK in last])

    def _by_task(self, values_NK: Sequence[np.ndarray]) -> Columns:
        return dict(zip(self.tasks, np.mean(values_NK, axis=0).tolist(), strict=True))
