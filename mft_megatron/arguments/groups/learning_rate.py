"""Schedules of the learning rate."""

import dataclasses

from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class LearningRateArguments:
    """Schedules count optimizer steps, so they do not depend on batch or world size. Step n has the rate at n - 1
    steps; the first step of a warm-up has --lr-warmup-init."""

    lr: float = option(None, "Peak learning rate.", at_least=0, required="--lr X")
    lr_decay_style: str = option(
        "linear",
        "Decay of the learning rate from the end of the warm-up on. WSD (warm-up, stable, decay) keeps --lr until the "
        "last --lr-wsd-decay-iters of the decay steps.",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    )
    lr_decay_iters: int = option(
        None,
        "Optimizer steps until the end of the decay, including the warm-up; --min-lr from then on. Not given: "
        "--train-iters.",
        at_least=1,
        derived=True,
    )
    lr_wsd_decay_style: str = option(
        "exponential", "Decay in the last steps of WSD.", choices=("exponential", "linear", "cosine", "minus_sqrt")
    )
    lr_wsd_decay_iters: int | None = option(
        None, "Optimizer steps of WSD's decay, the last of the decay steps.", at_least=1
    )
    lr_warmup_iters: int = option(0, "Optimizer steps of linear warm-up.", at_least=0)
    lr_warmup_fraction: float | None = option(None, "Warm-up as a fraction of the decay steps.", at_least=0, below=1)
    lr_warmup_init: float = option(0.0, "Learning rate the warm-up starts from.", at_least=0)
    min_lr: float = option(0.0, "Learning rate at the end of the decay, and the lowest during it.", at_least=0)
    decoupled_lr: float | None = option(
        None, "Peak learning rate of the word embedding and the output layer. Not given: --lr.", at_least=0
    )
    decoupled_min_lr: float | None = option(
        None, "Their learning rate at the end of the decay. Not given: --min-lr.", at_least=0
    )

    @property
    def warmup_steps(self) -> float:
        """Optimizer steps of the warm-up; a fraction of the decay steps is not rounded, as in Megatron."""
        if self.lr_warmup_fraction is not None:
            return self.lr_warmup_fraction * self.lr_decay_iters
        return self.lr_warmup_iters
