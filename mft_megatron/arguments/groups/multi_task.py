"""Options of the objective and its balancers."""

import dataclasses

from mft_megatron.loss_names import BALANCERS, FINE_TUNING_NORMALIZATION, LOSSES
from mft_megatron.options import option

# Values of MFTCoder's --weighted_loss_mode that name a balancer.
MFTCODER_BALANCERS = {"coba": "coba", "selfpaced": "self-paced"}
_DRAW_HELP = (
    "Packs of a validation draw; more if one pack cannot hold every task. In MFTCoder: micro-batches of each rank."
)


@dataclasses.dataclass(frozen=True)
class MultiTaskArguments:
    """The objective and its balancers: docs/LOSSES.md."""

    mft_loss: str = option(
        "task-token",
        "What counts equally: every token, every sample, or every task (by its tokens or by its samples); or a focal "
        "loss, by samples or by tasks. MFTCoder's values coba and selfpaced mean task-token with that --task-balance.",
        choices=LOSSES,
        aliases=("--weighted_loss_mode",),
        values={
            **{"case1": "token", "case2": "sample", "case3": "task-token", "case4": "task-sample"},
            **{name: name for name in MFTCODER_BALANCERS},
        },
    )
    mft_normalization: str = option(
        None,
        "What the loss of a task is normalised over, the same on every parallel layout: the global batch, so that a "
        "task has its weight in every step that it is in; or an epoch, so that it has its weight over the epoch and "
        "every one of its tokens (or samples) counts the same, in whichever step it is (not for focal losses). Or each "
        "micro-batch as in MFTCoder, for comparison; task weights then have little effect if micro-batches are small. "
        f"By default {FINE_TUNING_NORMALIZATION} to fine-tune with task-token or task-sample (a run that starts from a "
        "model's weights), else global; a resumed run keeps that of its checkpoint.",
        choices=("global", "epoch", "micro-batch"),
        derived=True,
    )
    task_weights: tuple[str, ...] | None = option(
        None,
        "Weight of each task for task-token and task-sample: name=number …, by default that of the data set's task "
        "file, else 1; or one list in the data set's order of tasks, as in MFTCoder: '[1.0, 2.0]'.",
        aliases=("--task_weights",),
        metavar="NAME=W",
    )
    task_balance: str = option(
        "static",
        "Source of the weights of task-token and task-sample: --task-weights (static), or a balancer that computes "
        "them from validation losses.",
        choices=BALANCERS,
    )
    focal_gamma: float = option(2.0, "Exponent of the focal losses; 0 turns them into task-sample.", at_least=0)
    focal_alpha: tuple[str, ...] | None = option(
        None, "Weight of each task in the focal losses, given as in --task-weights; above 0.", metavar="NAME=A"
    )
    focal_detach: bool = option(
        False, "Treat the modulating factor of the focal losses as a constant in the backward pass."
    )
    self_paced_history_length: int = option(
        100, "Validation draws in the window of slopes.", at_least=2, aliases=("--selfpaced_history_length",)
    )
    self_paced_update_interval: int = option(
        1, "Steps from one validation draw to the next.", at_least=1, aliases=("--selfpaced_interval",)
    )
    self_paced_sample_valid_num: int = option(1, _DRAW_HELP, at_least=1, aliases=("--selfpaced_sample_valid_num",))
    self_paced_scale_factor: float = option(
        50.0, "Gain before the last softmax.", above=0, aliases=("--selfpaced_scale_factor",)
    )
    famo_lr: float = option(0.025, "Learning rate of FAMO's logits.", at_least=0)
    famo_weight_decay: float = option(0.01, "L2 weight decay of FAMO's logits.", at_least=0)
    famo_beta1: float = option(0.9, "First coefficient of FAMO's Adam.", at_least=0, below=1)
    famo_beta2: float = option(0.999, "Second coefficient of FAMO's Adam.", at_least=0, below=1)
    famo_min_losses: tuple[str, ...] | None = option(
        None, "Lowest loss that each task can reach, given as in --task-weights; 0 where not named.", metavar="NAME=B"
    )
    famo_update_interval: int = option(1, "Steps from one validation draw to the next.", at_least=1)
    famo_sample_valid_num: int = option(1, f"{_DRAW_HELP} FAMO draws the same samples every time.", at_least=1)
    coba_variant: str = option(
        "paper", "CoBa's arithmetic: as published, or as released in MFTCoder v0.5.", choices=("paper", "release")
    )
    coba_warmup_steps: int = option(100, "Steps with uniform weights.", at_least=0, aliases=("--coba_warmup_steps",))
    coba_history_length: int = option(
        200, "Validation draws in the window of slopes.", at_least=2, aliases=("--coba_history_length",)
    )
    coba_tau: float = option(5.0, "Temperature of the divergence factor.", above=0, aliases=("--coba_tau",))
    coba_update_interval: int = option(
        1, "Steps from one validation draw to the next.", at_least=1, aliases=("--coba_update_interval",)
    )
    coba_sample_valid_num: int = option(1, _DRAW_HELP, at_least=1, aliases=("--coba_sample_valid_num",))
