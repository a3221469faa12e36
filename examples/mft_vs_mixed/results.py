"""From the measurements of all runs to the numbers of the tables.

::

    Run ─columns─► one number per column ─┬─ over seeds ─► Spread (mean, std)
                                          └─ seed by seed against another method ─► Difference (mean, 95 %)

Shapes: T logged steps, K tasks, N seeds.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from measurements import Columns, Run

# Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom; beyond the list its last one, which is larger.
STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


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
    """All measurements, in the order of the seeds.

    ``runs``: method → its runs. ``models``: columns of what has no run of its own: the base, one model a task.
    """

    runs: Mapping[str, Sequence[Run]]
    models: Mapping[str, Sequence[Columns]] = dataclasses.field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return next(iter(self.runs.values()))[0].tasks

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the methods, then of the other models."""
        return (*self.runs, *self.models)

    def has(self, method: str, column: str) -> bool:
        """Whether a column was measured for a method."""
        return column in self._columns(method)[0]

    def values(self, method: str, column: str) -> list[float]:
        """One value per seed."""
        return [columns[column] for columns in self._columns(method)]

    def spread(self, method: str, column: str) -> Spread:
        """Mean and standard deviation of a column over the seeds."""
        return spread(self.values(method, column))

    def paired(self, method: str, other: str, column: str) -> Difference:
        """A method minus another one, seed by seed."""
        return paired(self.values(method, column), self.values(other, column))

    def mean_share(self, method: str) -> Columns:
        """Realised share of each task in a step, mean over all steps and seeds."""
        return self._by_task([run.share_TK.mean(0) for run in self.runs[method]])

    def run_share(self, method: str) -> Columns:
        """Realised share of each task in the whole run, mean over the seeds."""
        return self._by_task([run.run_share_K for run in self.runs[method]])

    def presence(self, method: str) -> Columns:
        """Fraction of the steps that have a task, mean over the seeds."""
        return self._by_task([run.present_TK.mean(0) for run in self.runs[method]])

    def clipped(self, method: str, task: str, present: bool) -> float:
        """Fraction of clipped steps among those that have a sample of a task, or have none; NaN without such steps."""
        index = self.tasks.index(task)
        clipped = [run.clipped_T[run.present_TK[:, index] == present] for run in self.runs[method]]
        steps = np.concatenate(clipped)
        return float(steps.mean()) if len(steps) else math.nan

    def last_weight(self, method: str) -> Columns:
        """Weight of each task, over the last tenth of the steps and all seeds."""
        last = [run.weight_TK[-max(1, len(run.weight_TK) // 10) :] for run in self.runs[method]]
        return self._by_task([weight_TK.mean(0) for weight_TK in last])

    def _columns(self, method: str) -> Sequence[Columns]:
        return self.models[method] if method in self.models else [run.columns() for run in self.runs[method]]

    def _by_task(self, values_NK: Sequence[np.ndarray]) -> Columns:
        return dict(zip(self.tasks, np.mean(values_NK, axis=0).tolist(), strict=True))
