"""Settings that are allowed and are probably not meant: one line each, which the log of a run begins with."""

from collections.abc import Iterator

from mft_megatron.loss_names import FOCAL

from .groups.validation import ValidationArguments
from .table import Arguments

# steps of a run that nobody wants to lose
LONG_RUN = 1000


def notes(a: Arguments, training_packs: int, has_validation: bool, on_gpu: bool = False) -> list[str]:
    """List the settings of a run that trains that are probably not meant.

    Args:
        a: complete and checked.
        training_packs: of the data set.
        has_validation: whether it has a validation split.
        on_gpu: whether the run computes on GPUs.
    """
    return [
        *_saving(a),
        *_learning_rate(a),
        *_validation(a, has_validation),
        *_batches(a, training_packs),
        *_dropout(a),
        *_precision(a, on_gpu),
        *_normalization(a),
        *_timeouts(a),
    ]


def _saving(a: Arguments) -> Iterator[str]:
    c, steps = a.checkpoint, a.training.train_iters
    if c.save is None:
        yield "no --save: what is trained is lost when the run ends"
    elif c.save_interval is None:
        if steps >= LONG_RUN and a.training.exit_interval is None:
            yield f"no --save-interval: nothing is saved before the last of {steps} steps"
    elif c.save_interval > steps:
        yield f"--save-interval {c.save_interval} is more than the {steps} steps: only the last one is saved"
    if c.finetune and a.in_own_folder:
        yield (
            f"--finetune from the --save folder {c.save}: started again, the run begins at iteration 0 and replaces "
            "its checkpoints; --pretrained-checkpoint starts from weights once, and continues after that"
        )


def _learning_rate(a: Arguments) -> Iterator[str]:
    schedule, steps = a.learning_rate, a.training.train_iters
    after_decay = steps - schedule.lr_decay_iters
    if not schedule.lr:
        yield "--lr 0: no weight changes"
    if schedule.warmup_steps >= steps:
        yield f"the warm-up takes {schedule.warmup_steps:g} steps, the run {steps}: --lr is never reached"
    if schedule.lr_decay_style == "constant" or schedule.lr_decay_iters == steps:
        return
    decay = f"--lr-decay-iters {schedule.lr_decay_iters}"
    if schedule.lr_decay_iters > steps:
        yield f"{decay}: the run ends after {steps} steps, before the learning rate is at --min-lr"
    elif schedule.min_lr:
        yield f"{decay}: the last {after_decay} of {steps} steps have --min-lr {schedule.min_lr:g}"
    else:
        yield (
            f"{decay} and --min-lr 0: the last {after_decay} of {steps} steps change nothing; leave "
            "--lr-decay-iters out, or give --min-lr"
        )


def _validation(a: Arguments, has_validation: bool) -> Iterator[str]:
    v, steps = a.validation, a.training.train_iters
    if not has_validation:
        default = ValidationArguments()
        asked_for = (v.eval_interval, v.full_validation) != (default.eval_interval, default.full_validation)
        if asked_for or v.eval_iters:
            yield "the data set has no validation split: nothing is evaluated; preprocess it with --split 98,2,0"
        return
    evaluations = -(-steps // v.eval_interval)
    for name, patience in (
        ("--early-stopping-patience", v.early_stopping_patience),
        ("--task-early-stopping-patience", v.task_early_stopping_patience),
    ):
        # the first evaluation is the best so far
        if patience is not None and patience >= evaluations:
            yield (
                f"{name} {patience}: the run has only {evaluations} evaluations, one each {v.eval_interval} steps, and "
                "nothing will stop early; lower --eval-interval"
            )


def _batches(a: Arguments, training_packs: int) -> Iterator[str]:
    largest = max(a.batch_sizes.sizes)
    if a.total_packs is not None:  # no step has more
        largest = min(largest, a.total_packs)
    if largest > training_packs:
        yield f"a batch of {largest} packs holds some of the {training_packs} training packs more than once"


def _dropout(a: Arguments) -> Iterator[str]:
    rates = a.regularization.hidden_dropout, a.regularization.attention_dropout
    if any(rates) and a.weights_alone and a.resume is not None and a.resume.info.from_hugging_face:
        yield (
            f"--hidden-dropout {rates[0]:g} and --attention-dropout {rates[1]:g} (0.1 is Megatron's default): models "
            "from Hugging Face are usually trained with 0"
        )


def _precision(a: Arguments, on_gpu: bool) -> Iterator[str]:
    if on_gpu and a.precision.name == "fp32":
        yield "neither --bf16 nor --fp16: fp32 takes twice the memory on a GPU, and several times as long"


def _normalization(a: Arguments) -> Iterator[str]:
    m = a.multi_task
    if a.resume is None or a.weights_alone or m.mft_loss in FOCAL:
        return
    info = a.resume.info
    # checkpoints of older versions do not say it; the one value beside global may have been given all along
    unknown = info.format_version < 3 and m.mft_normalization == "micro-batch"
    if m.mft_normalization != info.mft_normalization and not unknown:
        yield (
            f"--mft-normalization {m.mft_normalization}: the run had {info.mft_normalization} up to its checkpoint; "
            "leave the option out to keep that"
        )


def _timeouts(a: Arguments) -> Iterator[str]:
    asked_for, stall = a.distributed.distributed_timeout_minutes, a.distributed.stall_timeout
    if asked_for is not None and a.world_size > 1 and asked_for <= stall:
        yield (
            f"--distributed-timeout-minutes {asked_for}: ends a run that hangs before --stall-timeout {stall:g} can "
            "say which rank does; give a shorter --stall-timeout"
        )
