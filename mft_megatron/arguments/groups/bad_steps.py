"""Options of steps whose numbers are not finite or jump."""

import dataclasses

from mft_megatron.options import option

ACTIONS = ("stop", "skip", "rollback")


@dataclasses.dataclass(frozen=True)
class BadStepArguments:
    """A bad step is found on all ranks before it updates anything; none of these options is Megatron's."""

    on_bad_step: str = option(
        "stop",
        "What becomes of a step whose loss, loss of a task or gradient norm is not finite, or jumps "
        "(--loss-spike-factor); it never updates anything. stop: the run ends, and names the samples with the "
        "largest losses and the last good checkpoint. skip: the global batch is left out, and training goes on. "
        "rollback: training goes back to the last good checkpoint in --save, and leaves the batch out when it comes "
        "again; before the first checkpoint it is skipped. Counts and digests of epochs say what was left out. With "
        "--fp16 gradients that overflow lower the loss scale as ever.",
        choices=ACTIONS,
    )
    loss_spike_factor: float | None = option(
        None,
        "A step is also bad if its loss, the loss of a task or the logarithm of the gradient norm is more than this "
        "many robust standard deviations (1.4826 × median absolute deviation) above its median over "
        "--loss-spike-window; 10 finds jumps that no batch explains. Not given: only what is not finite is bad, since "
        "how much losses vary depends on the data and the batch size.",
        above=0,
        metavar="Z",
    )
    loss_spike_window: int = option(
        128,
        "Last good steps, and for a task the last ones that had it, that a step is compared with; a quarter of them "
        "must be known.",
        at_least=16,
    )
    max_bad_steps: int = option(
        5,
        "The most steps in a row that are skipped, and the most rollbacks until a checkpoint with a new update is "
        "saved; the run ends at the next one.",
        at_least=1,
    )
