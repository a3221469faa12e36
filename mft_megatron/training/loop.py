"""The training loop: plan a step, take it, log it; at intervals update task weights, evaluate, save and stop."""

import time

from mft_megatron import progress_marks
from mft_megatron.arguments.table import Arguments
from mft_megatron.batch import StepPlan
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.step_plan import plan_step
from mft_megatron.losses.table import LOSSES
from mft_megatron.mcore.checkpointing.finite import NotFiniteError
from mft_megatron.mcore.model.parameters import weight_norm
from mft_megatron.mcore.parallel import process_groups, timeouts
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.trainer import StepReport, Trainer

from .bad_steps.bad_steps import BadSteps
from .bad_steps.good_checkpoint import diverged
from .balancing import TaskBalance
from .epochs import EpochProof
from .evaluation import Evaluation
from .events import event_record
from .exit_conditions import ExitConditions
from .garbage_collection import GarbageCollection
from .progress import Progress
from .records import StepRecord, train_record
from .restarts.endings import Ending, RunningRecord
from .run_log import RunLog
from .saving.data_order import order_version
from .saving.run_state import RunState
from .saving.saver import Saver
from .shares.share_log import ShareLog
from .throughput import segment_lengths, step_operations


def train(
    arguments: Arguments,
    dataset: PackedDataset,
    trainer: Trainer,
    evaluation: Evaluation,
    epochs: EpochProof,
    shares: ShareLog,
    bad_steps: BadSteps,
    saver: Saver,
    log: RunLog,
    progress: Progress,
) -> Ending:
    """Train from ``progress`` to the last step of the run, or until early stopping or an exit condition ends the run.

    Raises:
        InputError: training diverged: a step was bad and --on-bad-step or --max-bad-steps ends the run, a validation
            loss is not finite, or gradients overflow at the lowest loss scale; or an epoch did not use the data as
            planned.
        RollbackRequest: a step was bad, and the run is to go back to a checkpoint.
    """
    split, training, balance = dataset.split("train"), arguments.training, evaluation.balance
    exits, garbage = ExitConditions(arguments), GarbageCollection(training)

    def save(ending: bool) -> None:
        best = evaluation.is_best(progress)
        if saver.due(progress.step, ending, best):
            if bad_steps.doubted and not ending:
                log.print(f"step {progress.step}: not saved, since the weights may be to blame for the bad step")
                return
            usage = epochs.state(trainer, progress)
            state: RunState = {
                **evaluation.state(),
                **bad_steps.state(),
                "usage": usage,
                "shares": shares.state(),
            }
            try:
                saver.save(trainer, progress, log, ending, best, state)
            except NotFiniteError as error:
                why = f"step {progress.step}: {error.found} in it, so nothing is saved: training has diverged"
                what = f"{why}. Lower --lr or --clip-grad or lengthen the warm-up"
                raise diverged(arguments, what, bad_steps.proven) from error

    with exits, garbage, saver.completed_first():
        evaluation.begin(trainer, log, progress)
        if evaluation.make_up(trainer, log, progress):
            over = evaluation.finished or progress.step == training.train_iters
            if over or evaluation.is_best(progress):
                save(ending=True)
        if evaluation.finished:
            log.write(event_record(progress, "early stop", reason=evaluation.finished))
            saver.finish()
            return Ending(progress.step)
        shares.expect(log, progress, balance.weight_K, order_version(arguments, dataset))
        steps = StepLogger(arguments, dataset, trainer, shares, log)
        running = RunningRecord(arguments.checkpoint.save if process_groups.is_main() else None)
        exit_reason = exits.begin(trainer)
        if exit_reason is not None:
            log.write(event_record(progress, "exit", reason=exit_reason))
        while progress.step < training.train_iters and exit_reason is None:
            before, plan = progress, next_plan(dataset, arguments, progress)
            progress_marks.mark_step(progress.step + 1, plan.packs_G)
            consumed = plan.num_packs
            plan, left_out = bad_steps.left_out.divide(split, plan, before.consumed_samples)
            if left_out is not None:
                trainer.leave_out(split, left_out)
            report = None
            if plan.num_packs:
                report = trainer.train_step(split, plan, balance.weight_K, bad_steps.judge)
            timeouts.limit()
            progress = before.after_step(consumed, skipped=report is None or not report.updated)
            progress_marks.mark("after the step")
            steps.count(progress, plan, report, followed=_other_work_follows(arguments, balance, progress.step))
            shares.count(plan, report)
            if report is not None and report.refused is not None:
                progress_marks.mark("bad step")
                saver.complete(progress, log)  # so that it can be named, or gone back to
            bad_steps.after_step(trainer, log, before, progress, plan, report)
            if report is not None and report.overflow:
                _refuse_lasting_overflow(arguments, progress, report.loss_scale, bad_steps.proven)
            saver.poll(progress, log)
            progress_marks.mark("after the step")
            epochs.after_step(trainer, log, before, progress)
            if balance.after_step(trainer, log, progress):
                steps.count_draw()
            running.after_step(progress.step)
            last = progress.step == training.train_iters
            exit_reason = exits.reason(progress.step, report)
            steps.write(progress, last)
            if progress.step % arguments.validation.eval_interval == 0 or last:
                progress_marks.mark("evaluation")
                if exits.hurried:
                    evaluation.postpone(log)
                else:
                    with garbage.around_evaluation():
                        evaluation.run(trainer, log, progress)
                    if evaluation.postponed:
                        exit_reason = exits.interrupted()
                progress_marks.mark("after the step")
            garbage.after_step(progress.step)
            shares.judge(log, before, progress, over=last or bool(evaluation.finished))
            save(ending=last or bool(exit_reason or evaluation.finished))
            steps.exclude_time()
            if evaluation.finished:
                log.write(event_record(progress, "early stop", reason=evaluation.finished))
                break
            if exit_reason is not None and (evaluation.postponed or not last):
                log.write(event_record(progress, "exit", reason=exit_reason))
        saver.finish()
        left = evaluation.postponed or (progress.step < training.train_iters and not evaluation.finished)
        return Ending(progress.step, exit_reason if left else None, exits.hurried)


def _other_work_follows(arguments: Arguments, balance: TaskBalance, step: int) -> bool:
    """Whether a step is logged, or a validation draw, an evaluation or a save comes before the next one."""
    logging = arguments.logging
    intervals = (
        logging.log_interval,
        logging.tensorboard_log_interval,
        arguments.validation.eval_interval,
        arguments.checkpoint.save_interval,
    )
    ends = any(interval is not None and step % interval == 0 for interval in intervals)
    return ends or step == arguments.training.train_iters or balance.draws_after(step)


def next_plan(dataset: PackedDataset, arguments: Arguments, progress: Progress) -> StepPlan:
    """Plan the step that a run takes next."""
    return plan_step(
        dataset.split("train"),
        seed=arguments.initialization.seed,
        global_batch_size=arguments.batch_sizes.after(progress.consumed_samples),
        consumed_samples=progress.consumed_samples,
        end=arguments.total_packs,
        batch_multiple=arguments.batch_multiple,
        order_version=order_version(arguments, dataset),
    )


class StepLogger:
    """Log of steps at ``--log-interval``, and of their scalars at ``--tensorboard-log-interval``, with mean times.

    If the step to be logged was skipped, the last one before it is logged instead, or else the next.
    """

    def __init__(self, arguments: Arguments, dataset: PackedDataset, trainer: Trainer, shares: ShareLog, log: RunLog):
        self._arguments, self._dataset, self._trainer, self._log = arguments, dataset, trainer, log
        self._shares = shares
        self._clock = StepClock()
        self._due = False
        self._newest: tuple[Progress, StepPlan, StepReport] | None = None

    def count(self, progress: Progress, plan: StepPlan, report: StepReport | None, followed: bool) -> None:
        """Count a step that has just ended; one that updated nothing is logged at once, and its time excluded.

        Args:
            progress: after the step.
            plan: of the step.
            report: of the step; ``None`` where the batch had nothing to learn from, or is left out.
            followed: whether other work than the next step follows, which the step's time must not contain.
        """
        if report is None:
            self._clock.exclude()
            why = "no supervised token of a weighted task" if plan.num_packs else "its packs are left out"
            self._log.write(event_record(progress, "skip", reason=why))
        elif report.overflow:
            self._clock.exclude()
            reason = "gradients overflow at the loss scale"
            self._log.write(event_record(progress, "skip", reason=reason, loss_scale=report.loss_scale))
        elif report.refused is not None:
            self._clock.exclude()  # bad steps have an event of their own
        else:
            self._clock.count_step(complete=followed or self._due)
            self._newest = progress, plan, report

    def count_draw(self) -> None:
        """Count a validation draw that has just ended."""
        self._clock.count_draw()

    def exclude_time(self) -> None:
        """Count the time since the last step or draw for nothing."""
        self._clock.exclude()

    def write(self, progress: Progress, last: bool) -> None:
        """Log the newest step if an interval ends after ``progress``, or it is the ``last`` of the run."""
        options = self._arguments.logging
        self._due = self._due or progress.step % options.log_interval == 0 or last
        scalars_due = progress.step % (options.tensorboard_log_interval or options.log_interval) == 0
        if self._newest is None or not (self._due or scalars_due):
            return
        record = self._record(*self._newest)
        if scalars_due:
            self._log.write_scalars(record, self._machine_scalars())
        if self._due:
            self._log.write(record)
            self._clock.restart()
        self._due, self._newest = False, None

    def _record(self, progress: Progress, plan: StepPlan, report: StepReport) -> StepRecord:
        arguments, split = self._arguments, self._dataset.split("train")
        step_time, draw_time = self._clock.read()
        record = train_record(
            progress,
            report,
            plan,
            tokens=split.num_tokens(plan.packs_G),
            step_time=step_time,
            balance_time=draw_time,
            task_names=self._dataset.tasks,
            loss=LOSSES[arguments.multi_task.mft_loss],
            shares=self._shares.read(),
            each_layer=arguments.moe.moe_per_layer_logging,
        )
        if arguments.logging.log_params_norm:
            with self._trainer.weights.whole():
                record["params_norm"] = weight_norm(self._trainer.chunks)
        if arguments.logging.log_throughput:
            lengths = segment_lengths(split, plan.packs_G)
            supervised_tokens = int(plan.counts.tokens_K.sum())
            operations = step_operations(arguments, lengths, supervised_tokens, self._dataset.vocab_size)
            record["tflops"] = operations / step_time / arguments.world_size / 1e12
        return record

    def _machine_scalars(self) -> dict[str, float]:
        """Scalars of the machine, for boards alone: the number of ranks, and this rank's memory in bytes."""
        options = self._arguments.logging
        scalars: dict[str, float] = {}
        if options.log_world_size_to_tensorboard:
            scalars["world-size"] = self._arguments.world_size
        if options.log_memory_to_tensorboard:
            scalars |= {f"memory/{name}": value for name, value in devices.memory().items()}
        return scalars


class StepClock:
    """Mean wall time of steps, and of validation draws by step, since the last restart; other time is excluded."""

    def __init__(self):
        self._steps, self._step_seconds, self._draw_seconds = 0, 0.0, 0.0
        self._since = time.perf_counter()

    def count_step(self, complete: bool) -> None:
        """Count the time since the last call as a step.

        Args:
            complete: whether to wait for what the device still computes of it; otherwise the next step's time contains
                that, and the device always has work.
        """
        if complete:
            devices.synchronize()
        self._step_seconds += self._lap()
        self._steps += 1

    def count_draw(self) -> None:
        """Count the time since the last call as a validation draw."""
        self._draw_seconds += self._lap()

    def exclude(self) -> None:
        """Count the time since the last call for nothing."""
        self._lap()

    def read(self) -> tuple[float, float]:
        """Mean seconds of a step, and of draws by step, since the last :meth:`restart`; there was a step."""
        return self._step_seconds / self._steps, self._draw_seconds / self._steps

    def restart(self) -> None:
        """Forget all steps and draws."""
        self._steps, self._step_seconds, self._draw_seconds = 0, 0.0, 0.0

    def _lap(self) -> float:
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds


def _refuse_lasting_overflow(arguments: Arguments, progress: Progress, loss_scale: float | None, proven: int) -> None:
    """Check that the loss scale can be lowered after a step whose gradients overflowed.

    Args:
        arguments: of the run.
        progress: after the step.
        loss_scale: of the step.
        proven: steps of the newest weights that have had a finite loss.

    Raises:
        InputError: it cannot, on every rank.
    """
    precision = arguments.precision
    # after an overflow a dynamic loss scale is lowered, but not below its minimum
    if loss_scale is None or (precision.dynamic_loss_scale and loss_scale > precision.min_loss_scale):
        return
    remedy = "Lower --lr or --clip-grad, or train with --bf16"
    if not precision.dynamic_loss_scale:
        remedy = "Lower --loss-scale, --lr or --clip-grad, or train with --bf16"
    what = (
        f"step {progress.step}: gradients overflow at the loss scale {loss_scale:g}, and it cannot be lowered. {remedy}"
    )
    raise diverged(arguments, what, proven)
