"""Early stopping of a run, or of single tasks, on validation losses.

::

    state, record of an evaluation ─► after_evaluation ─► new state, outcome: the best so far? stop? which tasks?

A pure state machine: ranks that are given the same records come to the same outcome. A state is small and plain, goes
into every checkpoint and is resumed exactly. Losses are compared with the best one, which only an improvement
replaces, so that many small gains add up to one.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import TypedDict

import numpy as np

from mft_megatron.errors import InputError

from .records import EvaluationRecord

METRICS = ("macro", "objective")


class CurveState(TypedDict):
    """:class:`Curve` as a checkpoint stores it."""

    best: float | None
    step: int | None
    stalled: int


class StoppingContent(TypedDict):
    """A state in a checkpoint: dicts, lists, numbers and names alone; JSON keeps it exactly."""

    metric: str
    run: CurveState
    tasks: list[CurveState]
    stopped_at: list[int | None]


@dataclasses.dataclass(frozen=True)
class Curve:
    """The course of one validation loss.

    Attributes:
        best: its lowest value; ``None`` before there is one.
        step: the step of that value.
        stalled: evaluations since then that were no improvement.
    """

    best: float | None = None
    step: int | None = None
    stalled: int = 0

    def after(self, value: float | None, step: int, min_delta: float) -> "Curve":
        """The curve with one more evaluation.

        Args:
            value: the loss; ``None`` where the evaluation has no sample of the task, which then does not count; a value
                that is not finite is no improvement.
            step: of the evaluation.
            min_delta: an improvement is a loss lower than the best one by more than this.
        """
        if value is None:
            return self
        if math.isfinite(value) and (self.best is None or value < self.best - min_delta):
            return Curve(float(value), step)
        return dataclasses.replace(self, stalled=self.stalled + 1)

    def as_dict(self) -> CurveState:
        """The curve for a checkpoint."""
        return {"best": self.best, "step": self.step, "stalled": self.stalled}

    def __str__(self) -> str:
        return "no finite value" if self.best is None else f"best {self.best:.6g} at step {self.step}"


@dataclasses.dataclass(frozen=True)
class StoppingState:
    """The memory of early stopping.

    Attributes:
        metric: the loss that ``run`` follows.
        run: its curve.
        tasks: K curves; that of a stopped task stays as it was.
        stopped_at: K steps, ``None`` for a task that is active.
    """

    metric: str
    run: Curve
    tasks: tuple[Curve, ...]
    stopped_at: tuple[int | None, ...]

    @property
    def active_K(self) -> np.ndarray:  # noqa: N802  (a shape suffix)
        """Whether each task is still trained, bool [K]; the weight of the others is 0."""
        return np.array([step is None for step in self.stopped_at], dtype=bool)

    def as_dict(self) -> StoppingContent:
        """The state for a checkpoint."""
        return {
            "metric": self.metric,
            "run": self.run.as_dict(),
            "tasks": [curve.as_dict() for curve in self.tasks],
            "stopped_at": list(self.stopped_at),
        }

    @classmethod
    def from_dict(cls, content: StoppingContent) -> "StoppingState":
        """The state that :meth:`as_dict` has written."""
        return cls(
            content["metric"],
            Curve(**content["run"]),
            tuple(Curve(**curve) for curve in content["tasks"]),
            tuple(content["stopped_at"]),
        )


@dataclasses.dataclass(frozen=True)
class StoppedTask:
    """A task that has converged: its name, its best validation loss, and the step of that."""

    name: str
    best: float | None
    best_step: int | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The consequences of one evaluation.

    Attributes:
        improved: whether it is the best so far.
        reason: the reason to end the run; ``None`` if it continues.
        stopped_tasks: the tasks that this evaluation stopped.
    """

    improved: bool
    reason: str | None
    stopped_tasks: tuple[StoppedTask, ...]

    @property
    def stop(self) -> bool:
        """Whether the run ends."""
        return self.reason is not None


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """The options of early stopping, for the tasks of one data set.

    Attributes:
        task_names: K names.
        patience: the run ends after so many consecutive evaluations without an improvement of the metric; ``None`` for
            never, but the best is known all the same.
        metric: the loss to follow: macro, objective or the name of a task. The objective changes with the tasks'
            weights, so its values compare only while these stay.
        min_delta: an improvement is a loss lower than the best one by more than this; for single tasks, too.
        task_patience: a task is stopped after so many evaluations without an improvement of its loss; ``None`` for
            never.
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

    def __post_init__(self) -> None:
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
        tasks = len(self.task_names)
        return StoppingState(self.metric, Curve(), (Curve(),) * tasks, (None,) * tasks)

    def resume(self, content: StoppingContent) -> StoppingState:
        """The state that :meth:`StoppingState.as_dict` has written, under the present options.

        Another metric starts from the next evaluation. A task trains again if the patience that stopped it has been
        raised above its count, or taken away.
        """
        state = StoppingState.from_dict(content)
        stopped_at = tuple(
            step if self._converged(name, curve) else None
            for name, curve, step in zip(self.task_names, state.tasks, state.stopped_at, strict=True)
        )
        run = state.run if state.metric == self.metric else Curve()
        return dataclasses.replace(state, metric=self.metric, run=run, stopped_at=stopped_at)

    def changes(self, content: StoppingContent) -> list[str]:
        """Lines for the log about all that :meth:`resume` changes in a state that other options have left."""
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
            lines.append(f"the search for the best starts again, by {after.metric}; so far it was by {before.metric}")
        return lines

    def after_evaluation(self, state: StoppingState, record: EvaluationRecord) -> tuple[StoppingState, Outcome]:
        """Update a state with the record of one evaluation."""
        step = record["step"]
        run = state.run.after(self._followed(record), step, self.min_delta)
        tasks: list[Curve] = []
        stopped_at: list[int | None] = []
        newly: list[StoppedTask] = []
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
        """The reason to end the run, for the log; ``None`` if it continues. A resumed run asks first of all."""
        if self.patience is not None and state.run.stalled >= self.patience:
            loss = f"{self.metric} validation loss" if self.metric in METRICS else f"validation loss of {self.metric}"
            return (
                f"{loss}: {state.run}, not improved by more than {self.min_delta:g} in {state.run.stalled} evaluations "
                f"since (--early-stopping-patience {self.patience})"
            )
        trained_K = [self.trained is None or name in self.trained for name in self.task_names]
        if any(step is not None for step in state.stopped_at) and not (state.active_K & trained_K).any():
            return f"every task has stopped (--task-early-stopping-patience {self.task_patience})"
        return None

    def _followed(self, record: EvaluationRecord) -> float | None:
        """The value of the metric in an evaluation."""
        if self.metric == "macro":
            return record["macro_loss"]
        return record["loss"] if self.metric == "objective" else record["tasks"][self.metric]["loss"]

    def _converged(self, name: str, curve: Curve) -> bool:
        trained = self.trained is None or name in self.trained
        return self.task_patience is not None and trained and curve.stalled >= self.task_patience
