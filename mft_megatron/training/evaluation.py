"""What validation losses decide during a run: the record, the task weights, when to stop and what to keep.

::

    every --eval-interval steps: whole validation split ─► record ─► early stopping, best checkpoint, stopped tasks
    every few steps, with a balancer: a draw ─► task weights (:mod:`.balancing`)
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from mft_megatron.arguments.table import Arguments
from mft_megatron.batch import StepPlan
from mft_megatron.data.loading.dataset import PackedDataset, PackedSplit
from mft_megatron.data.loading.step_plan import plan_evaluation
from mft_megatron.errors import InputError
from mft_megatron.mcore.trainer import Trainer

from .balancing import task_balance
from .early_stopping import EarlyStopping
from .events import event_record
from .progress import Progress
from .records import valid_record
from .run_log import RunLog


class Evaluation:
    """Evaluations of a run and what follows from them. ``balance``: the task weights, which draws change, too."""

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
        if self._keeps_best and "valid" not in dataset.splits:
            raise InputError(
                f"--save-best compares evaluations, and {dataset.prefix} has no validation split; preprocess it with "
                "--split 98,2,0, or leave it out"
            )

    def begin(self, trainer: Trainer, log: RunLog, progress: Progress) -> None:
        """Before the first step: start the balancer, which may want to know the losses of the fresh model."""
        first_loss_K = None
        if self.balance.needs_first_losses:
            record = self._record(trainer, progress, limit=None)
            log.write(record)
            losses = [record["tasks"][name]["loss"] for name in self._dataset.tasks]
            first_loss_K = np.array([math.nan if loss is None else loss for loss in losses])
        self.balance.stop_tasks(self._state.active_K)
        self.balance.begin(trainer, log, progress, first_loss_K)

    def run(self, trainer: Trainer, log: RunLog, progress: Progress) -> None:
        """Evaluate on the validation split and draw the consequences; nothing where there is no such split."""
        limit = self._arguments.validation.eval_iters
        if "valid" not in self._dataset.splits or limit == 0:
            return
        record = self._record(trainer, progress, limit)
        log.write(record)
        self._state, outcome = self._stopping.after_evaluation(self._state, record)
        if outcome.improved:
            self._best_step = progress.step
        for task in outcome.stopped_tasks:
            event = {"task": task.name, "best_loss": task.best, "best_step": task.best_step}
            log.write(event_record(progress, "task early stop", **event, weight=0.0))
        if outcome.stopped_tasks:
            self.balance.stop_tasks(self._state.active_K)

    @property
    def finished(self) -> str | None:
        """Why the run is over; ``None`` while it is not."""
        return self._stopping.finished(self._state)

    def is_best(self, progress: Progress) -> bool:
        """Whether this step has the best evaluation so far, and its checkpoint is to be kept for that."""
        return self._keeps_best and self._best_step == progress.step

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"stopping": self._state.as_dict(), "balance": self.balance.state()}

    def load(self, state: dict[str, Any], log: RunLog, progress: Progress) -> None:
        """Go on from a checkpoint's state; nothing where it has none."""
        if "stopping" in state:
            self._state = self._stopping.resume(state["stopping"])
            for reason in self._stopping.changes(state["stopping"]):
                log.write(event_record(progress, "warning", reason=reason))
        if "balance" in state:
            self.balance.load(state["balance"], log, progress)

    def _evaluated_tasks(self) -> set[str]:
        """Names of the tasks of which evaluations see a supervised token; --eval-iters may leave some out."""
        limit = self._arguments.validation.eval_iters
        if "valid" not in self._dataset.splits or limit == 0:
            return set()
        plans = evaluation_plans(self._arguments, self._dataset.split("valid"), limit)
        return _named(self._dataset, sum(plan.supervised_tokens_K for plan in plans))

    def _record(self, trainer: Trainer, progress: Progress, limit: int | None) -> dict[str, Any]:
        split = self._dataset.split("valid")
        plans = list(evaluation_plans(self._arguments, split, limit))
        report = trainer.evaluate(split, plans, self.balance.weight_K)
        if not report.loss_K.isfinite().all():
            raise InputError(
                f"step {progress.step}: a validation loss is not finite; training has diverged. Lower --lr or "
                "--clip-grad, and continue from the last checkpoint with --load"
            )
        return valid_record(progress, report, self._dataset.tasks)


def evaluation_plans(arguments: Arguments, split: PackedSplit, limit: int | None) -> Iterator[StepPlan]:
    """The split, every sample once, in batches no larger than a global batch and not larger than the split needs.

    ``limit``: the most batches; ``None`` for all.
    """
    needed = -(-split.num_packs // arguments.batch_multiple) * arguments.batch_multiple
    plans = plan_evaluation(split, min(arguments.training.global_batch_size, needed))
    for number, plan in enumerate(plans):
        if limit is not None and number >= limit:
            return
        yield plan


def _counts(split: PackedSplit) -> np.ndarray:
    """Supervised tokens of each task in a whole split, int64 [K]."""
    return split.counts(np.arange(split.num_packs))[0]


def _named(dataset: PackedDataset, number_K: np.ndarray) -> set[str]:
    """Names of the tasks with a number above 0."""
    return {name for name, number in zip(dataset.tasks, number_K, strict=True) if number > 0}
