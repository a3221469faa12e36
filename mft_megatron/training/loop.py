"""The training loop and the evaluation pass."""

import math
import time
from collections.abc import Iterator

from mft_megatron.arguments import Arguments
from mft_megatron.batch import StepPlan
from mft_megatron.data.dataset import PackedDataset, PackedSplit
from mft_megatron.data.step_plan import plan_evaluation, plan_step
from mft_megatron.errors import InputError
from mft_megatron.mcore import platform
from mft_megatron.mcore.step import Trainer
from mft_megatron.training.progress import Progress
from mft_megatron.training.records import event_record, train_record, valid_record
from mft_megatron.training.run_log import RunLog
from mft_megatron.training.saving import Saver


def train(
    arguments: Arguments, dataset: PackedDataset, trainer: Trainer, saver: Saver, log: RunLog, progress: Progress
) -> Progress:
    """Train from ``progress`` to ``--train-iters``; evaluate, save and log on the way.

    Raises:
        InputError: training diverged: the gradient norm is not finite.
    """
    split, training = dataset.split("train"), arguments.training
    clock = _Clock()
    while progress.step < training.train_iters:
        plan = plan_step(
            split,
            seed=arguments.initialization.seed,
            global_batch_size=training.global_batch_size,
            consumed_samples=progress.consumed_samples,
        )
        report = trainer.train_step(split, plan)
        progress = progress.after_step(training.global_batch_size, skipped=report is None)
        clock.count_step()
        last = progress.step == training.train_iters
        leaving = training.exit_interval is not None and progress.step % training.exit_interval == 0
        if report is None:
            log.write(event_record(progress, "skip", reason="no supervised token of a weighted task"))
        else:
            _refuse_divergence(progress, report.grad_norm)
            if progress.step % arguments.logging.log_interval == 0 or last:
                tokens = split.num_tokens(plan.packs_G)
                log.write(train_record(progress, report, plan, tokens, clock.step_time(), dataset.tasks))
        if progress.step % arguments.validation.eval_interval == 0 or last:
            evaluate(arguments, dataset, trainer, log, progress)
        if saver.due(progress.step, last or leaving):
            saver.save(trainer, progress, log)
        clock.leave_out()
        if leaving and not last:
            log.write(event_record(progress, "exit", reason=f"--exit-interval {training.exit_interval}"))
            break
    return progress


def evaluate(arguments: Arguments, dataset: PackedDataset, trainer: Trainer, log: RunLog, progress: Progress) -> None:
    """Evaluate on the validation split, every sample once, and log the result; nothing where there is none."""
    if "valid" not in dataset.splits or arguments.validation.eval_iters == 0:
        return
    split = dataset.split("valid")
    report = trainer.evaluate(split, list(_evaluation_plans(arguments, split)))
    log.write(valid_record(progress, report, dataset.tasks))


def _evaluation_plans(arguments: Arguments, split: PackedSplit) -> Iterator[StepPlan]:
    """The split in batches no larger than a global batch, and not larger than the split needs."""
    smallest = arguments.training.micro_batch_size * arguments.data_parallel_size
    needed = -(-split.num_packs // smallest) * smallest
    plans = plan_evaluation(split, min(arguments.training.global_batch_size, needed))
    limit = arguments.validation.eval_iters
    for number, plan in enumerate(plans):
        if limit is not None and number >= limit:
            return
        yield plan


def _refuse_divergence(progress: Progress, grad_norm: float) -> None:
    if not math.isfinite(grad_norm):
        raise InputError(
            f"step {progress.step}: the gradient norm is {grad_norm}; training has diverged. Lower --lr or --clip-grad "
            "or lengthen the warm-up, and continue from the last checkpoint with --load"
        )


class _Clock:
    """Mean wall time of the steps since it was last read; time spent on anything else is left out."""

    def __init__(self):
        self._steps, self._seconds, self._since = 0, 0.0, time.perf_counter()

    def count_step(self) -> None:
        platform.synchronize()
        self._seconds += time.perf_counter() - self._since
        self._steps += 1

    def leave_out(self) -> None:
        self._since = time.perf_counter()

    def step_time(self) -> float:
        mean = self._seconds / self._steps
        self._steps, self._seconds = 0, 0.0
        return mean
