"""Evaluations of a run and their consequences: the record, when to stop, which tasks to stop and what to keep.

::

    every --eval-interval steps: whole validation split ─► record ─► early stopping, best checkpoint, stopped tasks
    every few steps, with a balancer: a draw ─► task weights (:mod:`.balancing`)
"""

import itertools
import math
from collections.abc import Iterator
from typing import TypedDict

import numpy as np

from mft_megatron.arguments.table import Arguments
from mft_megatron.batch import StepPlan
from mft_megatron.data.loading.dataset import PackedDataset, PackedSplit
from mft_megatron.data.loading.step_plan import plan_evaluation
from mft_megatron.errors import InputError
from mft_megatron.mcore.trainer import EvaluationInterruptedError, Trainer

from .bad_steps.good_checkpoint import diverged
from .balancing import BalanceState, task_balance
from .early_stopping import EarlyStopping, StoppingContent
from .events import event_record
from .progress import Progress
from .records import EvaluationRecord, valid_record
from .run_log import RunLog


class EvaluationState(TypedDict, total=False):
    """The part of a checkpoint's state that evaluations and task weights read; empty where a run starts."""

    stopping: StoppingContent
    balance: BalanceState
    postponed: bool


class Evaluation:
    """Evaluations of a run and their consequences; ``balance`` has the task weights, which draws change, too."""

    def __init__(self, arguments: Arguments, dataset: PackedDataset):
        """
        Raises:
            InputError: options that need validation data, or tasks, that the data set does not have.
        """
        self._arguments = arguments
        self._dataset = dataset
        self.balance = task_balance(arguments, dataset)
        options = arguments.validation
        trained = _named(dataset, self.balance.weight_K) & _named(dataset, _counts(dataset.split("train")))
        if not trained:
            raise InputError(f"no task with a weight has a supervised token in the training split of {dataset.prefix}")
        self._stopping = EarlyStopping(
            dataset.tasks,
            options.early_stopping_patience,
            options.early_stopping_metric,
            options.early_stopping_min_delta,
            options.task_early_stopping_patience,
            validated=self._evaluated_tasks(),
            trained=trained,
        )
        self._state = self._stopping.begin()
        self._keeps_best = arguments.checkpoint.save_best or options.early_stopping_patience is not None
        self._best_step: int | None = None
        self._postponed = False
        if self._keeps_best and "valid" not in dataset.splits:
            raise InputError(
                f"--save-best compares evaluations, and {dataset.prefix} has no validation split; preprocess it with "
                "--split 98,2,0, or leave it out"
            )

    def begin(self, trainer: Trainer, log: RunLog, progress: Progress) -> None:
        """Start the balancer before the first step, with the losses over the whole split if it needs them."""
        first_loss_K = None
        if self.balance.needs_first_losses:
            record = self._record(trainer, progress, limit=None)
            log.write(record)
            losses = [record["tasks"][name]["loss"] for name in self._dataset.tasks]
            first_loss_K = np.array([math.nan if loss is None else loss for loss in losses])
        self.balance.stop_tasks(self._state.active_K)
        self.balance.begin(trainer, log, progress, first_loss_K)

    def run(self, trainer: Trainer, log: RunLog, progress: Progress) -> None:
        """Evaluate on the validation split, if there is one, and stop tasks or note the best step accordingly.

        An evaluation that a signal interrupts is :attr:`postponed`.
        """
        if not self._evaluates:
            return
        try:
            record = self._record(trainer, progress, self._arguments.validation.eval_iters)
        except EvaluationInterruptedError:
            self.postpone(log)
            return
        log.write(record)
        self._state, outcome = self._stopping.after_evaluation(self._state, record)
        if outcome.improved:
            self._best_step = progress.step
        for task in outcome.stopped_tasks:
            event = {"task": task.name, "best_loss": task.best, "best_step": task.best_step}
            log.write(event_record(progress, "task early stop", **event, weight=0.0))
        if outcome.stopped_tasks:
            self.balance.stop_tasks(self._state.active_K)

    def postpone(self, log: RunLog) -> None:
        """Leave the evaluation of this step to the job that resumes from it, because little time is left."""
        self._postponed = self._evaluates
        if self._postponed:
            log.print("the evaluation of this step is left to the job that resumes")

    def make_up(self, trainer: Trainer, log: RunLog, progress: Progress) -> bool:
        """Make the evaluation that an earlier job postponed; returns whether there was one."""
        postponed, self._postponed = self._postponed, False
        if postponed:
            self.run(trainer, log, progress)
        return postponed

    @property
    def postponed(self) -> bool:
        """Whether the evaluation of this step is left to the job that resumes from it."""
        return self._postponed

    @property
    def _evaluates(self) -> bool:
        return "valid" in self._dataset.splits and self._arguments.validation.eval_iters != 0

    @property
    def finished(self) -> str | None:
        """The reason that ends the run; ``None`` while it continues."""
        return self._stopping.finished(self._state)

    def is_best(self, progress: Progress) -> bool:
        """Whether this step has the best evaluation so far, and the best checkpoint is to be kept."""
        return self._keeps_best and self._best_step == progress.step

    def state(self) -> EvaluationState:
        """The state for a checkpoint."""
        postponed: EvaluationState = {"postponed": True} if self._postponed else {}
        return {"stopping": self._state.as_dict(), "balance": self.balance.state(), **postponed}

    def load(self, state: EvaluationState, log: RunLog, progress: Progress) -> None:
        """Continue from a checkpoint's state, as far as it has one."""
        if "stopping" in state:
            self._state = self._stopping.resume(state["stopping"])
            for reason in self._stopping.changes(state["stopping"]):
                log.write(event_record(progress, "warning", reason=reason))
        self._postponed = state.get("postponed", False)
        if "balance" in state:
            self.balance.load(state["balance"], log, progress)

    def _evaluated_tasks(self) -> set[str]:
        """Names of the tasks that have a supervised token in an evaluation; --eval-iters may leave some out."""
        limit = self._arguments.validation.eval_iters
        if not self._evaluates:
            return set()
        plans = evaluation_plans(self._arguments, self._dataset.split("valid"), limit)
        return _named(self._dataset, np.sum([plan.counts.tokens_K for plan in plans], axis=0))

    def _record(self, trainer: Trainer, progress: Progress, limit: int | None) -> EvaluationRecord:
        split = self._dataset.split("valid")
        plans = list(evaluation_plans(self._arguments, split, limit))
        report = trainer.evaluate(split, plans, self.balance.weight_K)
        if not report.loss_K.isfinite().all():
            what = f"step {progress.step}: a validation loss is not finite; training has diverged. "
            raise diverged(self._arguments, f"{what}Lower --lr or --clip-grad", most=progress.step - 1)
        return valid_record(progress, report, self._dataset.tasks)


def evaluation_plans(arguments: Arguments, split: PackedSplit, limit: int | None) -> Iterator[StepPlan]:
    """Plan batches of a split with every sample once, no larger than a global batch and than the split needs.

    Args:
        arguments: of the run.
        split: to evaluate on.
        limit: the most batches; ``None`` for all.
    """
    needed = -(-split.num_packs // arguments.batch_multiple) * arguments.batch_multiple
    plans = plan_evaluation(split, min(arguments.training.global_batch_size, needed))
    return itertools.islice(plans, limit)


def _counts(split: PackedSplit) -> np.ndarray:
    """Supervised tokens of each task in a whole split, int64 [K]."""
    return split.totals.tokens_K


def _named(dataset: PackedDataset, value_K: np.ndarray) -> set[str]:
    """Names of the tasks whose value, of any dtype, is above 0."""
    return {name for name, value in zip(dataset.tasks, value_K, strict=True) if value > 0}
