"""What is saved, and whether what is loaded goes with the run."""

from mft_megatron.arguments.table import Arguments
from mft_megatron.run_folder import is_checkpoint


def check_checkpointing(a: Arguments) -> str | None:
    c = a.checkpoint
    if c.save is None and c.save_interval is not None:
        return "--save-interval without --save: give --save DIR"
    if c.save is None and a.training.exit_interval is not None:
        return "--exit-interval without --save would lose the run: give --save DIR"
    if c.save is not None and c.load is None and is_checkpoint(c.save):
        return (
            f"--save {c.save} holds the checkpoints of another run: add --load {c.save} to go on with it, or name "
            "another folder"
        )
    if c.finetune and c.load is None:
        return "--finetune without --load: give the checkpoint to start from"
    if a.resume is None or c.finetune:
        return None
    if a.resume[1].iteration >= a.training.train_iters:
        return (
            f"--train-iters {a.training.train_iters}: the checkpoint is at iteration {a.resume[1].iteration} already; "
            "raise it, or start anew from its weights with --finetune"
        )
    if c.load_optim and not a.resume[1].has_optimizer:
        return f"--load {c.load}: saved with --no-save-optim; continue with --no-load-optim or --finetune"
    if c.load_optim and a.resume[1].precision != a.precision.name:
        return (
            f"--load {c.load}: its optimizer is of a {a.resume[1].precision} run, this one is {a.precision.name}; use "
            "the same precision, or continue with --no-load-optim or --finetune"
        )
    if c.load_optim and a.resume[1].decoupled_lr != (a.learning_rate.decoupled_lr is not None):
        was, now = ("saved with", "give it") if a.resume[1].decoupled_lr else ("saved without", "leave it out")
        return f"--load {c.load}: {was} --decoupled-lr; {now}, or continue with --no-load-optim or --finetune"
    return None
