"""The training loop: plan a step, take it, log it; now and then draw, evaluate, save and stop."""

import math
import time

from mft_megatron.arguments import Arguments
from mft_megatron.batch import StepPlan
from mft_megatron.data.dataset import PackedDataset
from mft_megatron.data.step_plan import plan_step
from mft_megatron.errors import InputError
from mft_megatron.loss_names import WEIGHTED
from mft_megatron.mcore import platform
from mft_megatron.mcore.step import StepReport, Trainer
from mft_megatron.training.epochs import EpochProof
from mft_megatron.training.evaluation import Evaluation
from mft_megatron.training.progress import Progress
from mft_megatron.training.records import event_record, share_warning, train_record
from mft_megatron.training.run_log import RunLog
from mft_megatron.training.saving import Saver


def train(
    arguments: Arguments,
    dataset: PackedDataset,
    trainer: Trainer,
    evaluation: Evaluation,
    epochs: EpochProof,
    saver: Saver,
    log: RunLog,
    progress: Progress,
) -> Progress:
    """Train from ``progress`` to ``--train-iters``, or to where evaluations say that it is enough.

    Raises:
        InputError: training diverged: the gradient norm or a validation loss is not finite; or an epoch did not use the
            data as planned.
    """
    split, training, balance = dataset.split("train"), arguments.training, evaluation.balance
    evaluation.begin(trainer, log, progress)
    if evaluation.finished:
        log.write(event_record(progress, "early stop", reason=evaluation.finished))
        return progress
    clock, due, unlogged, sizes = _Clock(), False, None, arguments.batch_sizes
    while progress.step < training.train_iters:
        batch_size = sizes.after(progress.consumed_samples)
        plan = plan_step(
            split,
            seed=arguments.initialization.seed,
            global_batch_size=batch_size,
            consumed_samples=progress.consumed_samples,
        )
        report = trainer.train_step(split, plan)
        before, progress = progress, progress.after_step(batch_size, skipped=report is None)
        if report is None:
            clock.leave_out()
            log.write(event_record(progress, "skip", reason="no supervised token of a weighted task"))
        else:
            clock.count_step()
            _refuse_divergence(progress, report.grad_norm)
            unlogged = (progress, report, plan)
        epochs.after_step(trainer, log, before, progress)
        if balance.after_step(trainer, log, progress):
            clock.count_draw()
        last = progress.step == training.train_iters
        leaving = training.exit_interval is not None and progress.step % training.exit_interval == 0
        # where the step that is due was skipped, the last one before it is logged, or else the next
        due = due or progress.step % arguments.logging.log_interval == 0 or last
        if due and unlogged is not None:
            _log_step(arguments, dataset, log, *unlogged, *clock.read())
            due, unlogged = False, None
        if progress.step % arguments.validation.eval_interval == 0 or last:
            evaluation.run(trainer, log, progress)
        ending = last or leaving or evaluation.finished is not None
        if saver.due(progress.step, ending, evaluation.to_keep(progress)):
            state = {**evaluation.state(), "usage": epochs.state(trainer, progress)}
            saver.save(trainer, progress, log, ending, evaluation.to_keep(progress), state)
        clock.leave_out()
        if evaluation.finished:
            log.write(event_record(progress, "early stop", reason=evaluation.finished))
            break
        if leaving and not last:
            log.write(event_record(progress, "exit", reason=f"--exit-interval {training.exit_interval}"))
            break
    return progress


def _log_step(
    arguments: Arguments,
    dataset: PackedDataset,
    log: RunLog,
    progress: Progress,
    report: StepReport,
    plan: StepPlan,
    step_time: float,
    balance_time: float,
) -> None:
    tokens = dataset.split("train").num_tokens(plan.packs_G)
    weighted = arguments.multi_task.mft_loss in WEIGHTED
    record = train_record(progress, report, plan, tokens, step_time, balance_time, dataset.tasks, weighted)
    log.write(record)
    warning = share_warning(record, arguments.multi_task.mft_normalization)
    if warning:
        log.write(event_record(progress, "warning", reason=warning))


def _refuse_divergence(progress: Progress, grad_norm: float) -> None:
    if not math.isfinite(grad_norm):
        raise InputError(
            f"step {progress.step}: the gradient norm is {grad_norm}; training has diverged. Lower --lr or --clip-grad "
            "or lengthen the warm-up, and continue from the last checkpoint with --load"
        )


class _Clock:
    """Mean wall time of steps, and of the balancer's draws by step, since it was last read; all else is left out."""

    def __init__(self):
        self._steps, self._seconds, self._balance, self._since = 0, 0.0, 0.0, time.perf_counter()

    def count_step(self) -> None:
        platform.synchronize()
        self._seconds += self._lap()
        self._steps += 1

    def count_draw(self) -> None:
        self._balance += self._lap()

    def leave_out(self) -> None:
        self._lap()

    def read(self) -> tuple[float, float]:
        """Seconds of a step, and of draws by step."""
        means = self._seconds / self._steps, self._balance / self._steps
        self._steps, self._seconds, self._balance = 0, 0.0, 0.0
        return means

    def _lap(self) -> float:
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds
