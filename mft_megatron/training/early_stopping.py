"""When to stop a run, or one task of it, on validation losses.

::

    state, record of an evaluation ─► after_evaluation ─► new state, outcome: the best so far? stop? which tasks?

A pure state machine: ranks that are given the same records come to the same outcome. A state is small and plain, goes
into every checkpoint and is resumed exactly. Losses are compared with the best one, which only an improvement
replaces, so that many small gains add up to one.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mft_megatron.errors import InputError

METRICS = {"macro": "macro_loss", "objective": "loss"}


@dataclasses.dataclass(frozen=True)
class Curve:
    """One validation loss: its ``best`` value and the ``step`` of that, ``None`` before there is one, and the number of
    evaluations since then that were no improvement."""

    best: float | None = None
    step: int | None = None
    stalled: int = 0

    def after(self, value: float | None, step: int, min_delta: float) -> "Curve":
        """The curve with one more evaluation; ``None``, no sample of the task, is none. NaN never improves."""
        if value is None:
            return self
        if math.isfinite(value) and (self.best is None or value < self.best - min_delta):
            return Curve(float(value), step)
        return dataclasses.replace(self, stalled=self.stalled + 1)

    def __str__(self) -> str:
        return "no finite value" if self.best is None else f"best {self.best:.6g} at step {self.step}"


@dataclasses.dataclass(frozen=True)
class StoppingState:
    """What early stopping remembers.

    ``metric``: what ``run`` follows. ``tasks``: K curves. ``stopped_at``: K steps, ``None`` for a task that is active.
    The curve of a stopped task stays as it was.
    """

    metric: str
    run: Curve
    tasks: tuple[Curve, ...]
    stopped_at: tuple[int | None, ...]

    @property
    def active_K(self) -> np.ndarray:  # noqa: N802  (a shape suffix)
        """Which tasks are still trained, bool [K]; the weight of the others is 0."""
        return np.array([step is None for step in self.stopped_at], dtype=bool)

    def as_dict(self) -> dict[str, Any]:
        """The state as dicts, lists, numbers and names alone; JSON keeps it exactly."""
        return {
            "metric": self.metric,
            "run": dataclasses.asdict(self.run),
            "tasks": [dataclasses.asdict(curve) for curve in self.tasks],
            "stopped_at": list(self.stopped_at),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "StoppingState":
        return cls(
            content["metric"],
            Curve(**content["run"]),
            tuple(Curve(**curve) for curve in content["tasks"]),
            tuple(content["stopped_at"]),
        )


@dataclasses.dataclass(frozen=True)
class StoppedTask:
    """A task that has converged: its best validation loss, and when that was."""

    name: str
    best: float | None
    best_step: int | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one evaluation means for the run.

    ``improved``: it is the best so far. ``reason``: why the run is over, ``None`` if it is not. ``stopped_tasks``:
    those that this evaluation stopped.
    """

    improved: bool
    reason: str | None
    stopped_tasks: tuple[StoppedTask, ...]

    @property
    def stop(self) -> bool:
        return self.reason is not None


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """The options, for the tasks of one data set.

    Args:
        task_names: K names.
        patience: stop after so many evaluations in a row without an improvement of the metric; ``None``: never, but the
            best is known all the same.
        metric: the loss to follow: macro, objective or the name of a task. The objective changes with the tasks'
            weights, so its values compare only while these stay.
        min_delta: an improvement is a loss lower than the best one by more than this; for single tasks, too.
        task_patience: a task whose own loss has not improved for so many evaluations is stopped; ``None``: none is.
        validated: names of the tasks that evaluations have samples of; ``None`` for all.
        trained: names of the tasks that have a weight and training samples; ``None`` for all. The others are never
            stopped, and do not keep a run going.

    Raises:
        InputError: no such metric, one that no evaluation will have, or nothing to evaluate at all.
    """

    task_names: tuple[str, ...]
    patience: int | None = None
    metric: str = "macro"
    min_delta: float = 0.0
    task_patience: int | None = None
    validated: Collection[str] | None = None
    trained: Collection[str] | None = None

    def __post_init__(self):
        validated = self.task_names if self.validated is None else self.validated
        wanted = "give " + ", ".join(METRICS)
        usable = ", ".join(name for name in self.task_names if name in validated)
        if usable:
            wanted += f" or a task of: {usable}"
        if self.metric not in METRICS and self.metric not in self.task_names:
            raise InputError(f"--early-stopping-metric {self.metric}: {wanted}")
        if self.metric not in METRICS and self.metric not in validated:
            raise InputError(
                f"--early-stopping-metric {self.metric}: evaluations see no sample of this task (or --eval-iters "
                f"leaves it out); {wanted}"
            )
        for option, value in (
            ("--early-stopping-patience", self.patience),
            ("--task-early-stopping-patience", self.task_patience),
        ):
            if value is not None and not usable:
                raise InputError(
                    f"{option} {value}: no task has validation samples; preprocess the data with a --split that has "
                    "some, or leave the option out"
                )

    def begin(self) -> StoppingState:
        """The state of a run before its first evaluation."""
        none = (None,) * len(self.task_names)
        return StoppingState(self.metric, Curve(), tuple(Curve() for _ in none), none)

    def resume(self, content: Mapping[str, Any]) -> StoppingState:
        """The state that :meth:`StoppingState.as_dict` has written, under the present options.

        Another metric starts from the next evaluation. A task trains again where the patience that stopped it has been
        raised above its count, or taken away.
        """
        state = StoppingState.from_dict(content)
        stopped_at = tuple(
            step if self._converged(name, curve) else None
            for name, curve, step in zip(self.task_names, state.tasks, state.stopped_at, strict=True)
        )
        run = state.run if state.metric == self.metric else Curve()
        return dataclasses.replace(state, metric=self.metric, run=run, stopped_at=stopped_at)

    def changes(self, content: Mapping[str, Any]) -> list[str]:
        """What :meth:`resume` changes about a state that other options have left, in lines for the log."""
        before, after = StoppingState.from_dict(content), self.resume(content)
        again = [
            name for name, was, now in zip(self.task_names, before.active_K, after.active_K, strict=True) if now > was
        ]
        lines = []
        if again:
            lines.append(
                f"{', '.join(again)}: trained again, as --task-early-stopping-patience is {self.task_patience} now"
            )
        if before.metric != after.metric:
            lines.append(f"the best is sought anew, by {after.metric}; until here it was by {before.metric}")
        return lines

    def after_evaluation(self, state: StoppingState, record: Mapping[str, Any]) -> tuple[StoppingState, Outcome]:
        """Take in one evaluation.

        Args:
            state: before it.
            record: of :func:`mft_megatron.training.records.valid_record`.
        """
        step = record["step"]
        run = state.run.after(self._followed(record), step, self.min_delta)
        tasks, stopped_at, newly = [], [], []
        for name, curve, stopped in zip(self.task_names, state.tasks, state.stopped_at, strict=True):
            if stopped is None:
                curve = curve.after(record["tasks"][name]["loss"], step, self.min_delta)
                if self._converged(name, curve):
                    stopped = step
                    newly.append(StoppedTask(name, curve.best, curve.step))
            tasks.append(curve)
            stopped_at.append(stopped)
        new = StoppingState(self.metric, run, tuple(tasks), tuple(stopped_at))
        return new, Outcome(run.best != state.run.best, self.finished(new), tuple(newly))

    def finished(self, state: StoppingState) -> str | None:
        """Why the run is over, for the log; ``None`` if it is not. A restarted job asks before its first step."""
        if self.patience is not None and state.run.stalled >= self.patience:
            what = f"{self.metric} validation loss" if self.metric in METRICS else f"validation loss of {self.metric}"
            return (
                f"{what}: {state.run}, not improved by more than {self.min_delta:g} in {state.run.stalled} evaluations "
                f"since (--early-stopping-patience {self.patience})"
            )
        trained_K = [self.trained is None or name in self.trained for name in self.task_names]
        if any(step is not None for step in state.stopped_at) and not (state.active_K & trained_K).any():
            return f"every task has stopped (--task-early-stopping-patience {self.task_patience})"
        return None

    def _followed(self, record: Mapping[str, Any]) -> float | None:
        return record[METRICS[self.metric]] if self.metric in METRICS else record["tasks"][self.metric]["loss"]

    def _converged(self, name: str, curve: Curve) -> bool:
        trained = self.trained is None or name in self.trained
        return self.task_patience is not None and trained and curve.stalled >= self.task_patience
