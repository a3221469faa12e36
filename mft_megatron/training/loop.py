"""The training loop: plan a step, take it, log it; now and then draw, evaluate, save and stop."""

import math
import time
from typing import Any

from mft_megatron.arguments.groups.mixed_precision import MixedPrecisionArguments
from mft_megatron.arguments.table import Arguments
from mft_megatron.batch import StepPlan
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.step_plan import plan_step
from mft_megatron.errors import InputError
from mft_megatron.losses.table import LOSSES
from mft_megatron.mcore.model.parameters import weight_norm
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.trainer import StepReport, Trainer

from .epochs import EpochProof
from .evaluation import Evaluation
from .events import event_record
from .exit_conditions import Leaving
from .garbage_collection import GarbageCollection
from .progress import Progress
from .records import share_warning, train_record
from .run_log import RunLog
from .saving import Saver
from .throughput import segment_lengths, step_operations


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
        InputError: training diverged: the gradient norm or a validation loss is not finite, or gradients overflow at
            the lowest loss scale; or an epoch did not use the data as planned.
    """
    leaving, garbage = Leaving(arguments.training), GarbageCollection(arguments.training)
    with leaving, garbage, saver.completed_first():
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
            report = trainer.train_step(split, plan, balance.weight_K)
            skipped = report is None or report.overflow
            before, progress = progress, progress.after_step(batch_size, skipped)
            if skipped:
                clock.leave_out()
                log.write(_skip_record(progress, report))
                _refuse_lasting_overflow(arguments.precision, progress, report)
            else:
                clock.count_step()
                _refuse_divergence(progress, report.grad_norm)
                unlogged = (progress, report, plan)
            saver.poll(progress, log)
            epochs.after_step(trainer, log, before, progress)
            if balance.after_step(trainer, log, progress):
                clock.count_draw()
            last = progress.step == training.train_iters
            reason = leaving.reason(progress.step)
            # where the step that is due was skipped, the last one before it is logged, or else the next
            due = due or progress.step % arguments.logging.log_interval == 0 or last
            drawn = progress.step % (arguments.logging.tensorboard_log_interval or arguments.logging.log_interval) == 0
            if (due or drawn) and unlogged is not None:
                _log_step(arguments, dataset, trainer, log, *unlogged, *clock.read(), due, drawn)
                if due:
                    clock.restart()
                due, unlogged = False, None
            if progress.step % arguments.validation.eval_interval == 0 or last:
                with garbage.around_evaluation():
                    evaluation.run(trainer, log, progress)
            garbage.after_step(progress.step)
            ending = last or reason is not None or evaluation.finished is not None
            if saver.due(progress.step, ending, evaluation.to_keep(progress)):
                state = {**evaluation.state(), "usage": epochs.state(trainer, progress)}
                saver.save(trainer, progress, log, ending, evaluation.to_keep(progress), state)
            clock.leave_out()
            if evaluation.finished:
                log.write(event_record(progress, "early stop", reason=evaluation.finished))
                break
            if reason is not None and not last:
                log.write(event_record(progress, "exit", reason=reason))
                break
        saver.finish()
        return progress


def _log_step(
    arguments: Arguments,
    dataset: PackedDataset,
    trainer: Trainer,
    log: RunLog,
    progress: Progress,
    report: StepReport,
    plan: StepPlan,
    step_time: float,
    balance_time: float,
    due: bool,
    drawn: bool,
) -> None:
    """Write a step down: everywhere where that is ``due``, and to boards where it is to be ``drawn``."""
    split, options = dataset.split("train"), arguments.logging
    tokens = split.num_tokens(plan.packs_G)
    weighted = LOSSES[arguments.multi_task.mft_loss].weighted
    each_layer = arguments.moe.moe_per_layer_logging
    record = train_record(progress, report, plan, tokens, step_time, balance_time, dataset.tasks, weighted, each_layer)
    if options.log_params_norm:
        with trainer.weights.whole():
            record["params_norm"] = weight_norm(trainer.chunks)
    if options.log_throughput:
        lengths = segment_lengths(split, plan.packs_G)
        operations = step_operations(arguments, lengths, record["supervised_tokens"], dataset.vocab_size)
        record["tflops"] = operations / step_time / arguments.world_size / 1e12
    if drawn:
        log.draw(record, _of_the_machine(arguments))
    if not due:
        return
    log.write(record)
    warning = share_warning(record, arguments.multi_task.mft_normalization)
    if warning:
        log.write(event_record(progress, "warning", reason=warning))


def _of_the_machine(arguments: Arguments) -> dict[str, float]:
    """What boards get besides the record."""
    scalars = {}
    if arguments.logging.log_world_size_to_tensorboard:
        scalars["world-size"] = arguments.world_size
    if arguments.logging.log_memory_to_tensorboard:
        scalars |= {f"memory/{name}": value for name, value in devices.memory().items()}
    return scalars


def _skip_record(progress: Progress, report: StepReport | None) -> dict[str, Any]:
    """Of a step that has updated nothing."""
    if report is None:
        return event_record(progress, "skip", reason="no supervised token of a weighted task")
    return event_record(progress, "skip", reason="gradients overflow at the loss scale", loss_scale=report.loss_scale)


def _refuse_lasting_overflow(precision: MixedPrecisionArguments, progress: Progress, report: StepReport | None) -> None:
    """A loss scale that is too high is lowered; one that cannot be is the end."""
    if report is None or (precision.dynamic_loss_scale and report.loss_scale > precision.min_loss_scale):
        return
    remedy = "lower --lr or --clip-grad, or train with --bf16, and continue from the last checkpoint with --load"
    if not precision.dynamic_loss_scale:
        remedy = f"lower --loss-scale, {remedy}"
    raise InputError(
        f"step {progress.step}: gradients overflow at the loss scale {report.loss_scale:g}, and it cannot be lowered; "
        f"{remedy}"
    )


def _refuse_divergence(progress: Progress, grad_norm: float) -> None:
    if not math.isfinite(grad_norm):
        raise InputError(
            f"step {progress.step}: the gradient norm is {grad_norm}; training has diverged. Lower --lr or --clip-grad "
            "or lengthen the warm-up, and continue from the last checkpoint with --load"
        )


class _Clock:
    """Mean wall time of steps, and of the balancer's draws by step, since it was started anew; all else is left out."""

    def __init__(self):
        self._steps, self._seconds, self._balance, self._since = 0, 0.0, 0.0, time.perf_counter()

    def count_step(self) -> None:
        devices.synchronize()
        self._seconds += self._lap()
        self._steps += 1

    def count_draw(self) -> None:
        self._balance += self._lap()

    def leave_out(self) -> None:
        self._lap()

    def read(self) -> tuple[float, float]:
        """Seconds of a step, and of draws by step, since the last :meth:`restart`."""
        return self._seconds / self._steps, self._balance / self._steps

    def restart(self) -> None:
        self._steps, self._seconds, self._balance = 0, 0.0, 0.0

    def _lap(self) -> float:
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds
