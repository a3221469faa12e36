"""Evaluation and early stopping."""

import dataclasses

from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class ValidationArguments:
    """Evaluation reads the validation split in order, every sample once."""

    eval_interval: int = option(
        1000, "Evaluate after this many steps, and after the last. Unlike in Megatron there is a default.", at_least=1
    )
    eval_iters: int | None = option(
        None,
        "Evaluate on this many global batches only; 0 disables evaluation. Unlike in Megatron the default is the "
        "whole validation split, exactly once.",
        at_least=0,
    )
    full_validation: bool = option(
        False, "Evaluate on the whole validation split, which is the default without --eval-iters."
    )
    skip_train: bool = option(False, "Evaluate the checkpoint of --load once, without training.")
    early_stopping_patience: int | None = option(
        None,
        "Stop after this many evaluations in a row without a better result; with --save it implies --save-best.",
        at_least=1,
        aliases=("--early_stopping_stall_num",),
    )
    early_stopping_metric: str = option(
        "macro",
        "What must improve: the mean of the tasks' validation losses (macro), the training objective over the "
        "validation split (objective; only if weights do not change), or the validation loss of a task, by its name "
        "(unless the task is named macro or objective).",
        metavar="macro|objective|TASK",
    )
    early_stopping_min_delta: float = option(
        0.0, "A loss of the run or of a task has improved if it is below the best one by more than this.", at_least=0
    )
    task_early_stopping_patience: int | None = option(
        None,
        "Give a task weight 0 after this many evaluations in a row in which its validation loss did not improve, "
        "see --early-stopping-min-delta.",
        at_least=1,
    )
