"""Check how long a run is."""

from mft_megatron.arguments.table import Arguments

# fields that say how long a run is; exactly one of them is given
LENGTHS = ("train_iters", "num_train_epochs")


def check_length(a: Arguments) -> str | None:
    """Check that the run has a length, and only one; before completion, which computes one from the other."""
    iterations, epochs = a.training.train_iters, a.training.num_train_epochs
    if iterations is None and epochs is None:
        return "missing option: give --train-iters N or --num-train-epochs E"
    if iterations is not None and epochs is not None:
        return (
            f"--train-iters {iterations} and --num-train-epochs {epochs:g} both say how long the run is; give one of "
            "them"
        )
    return None
