"""Check what a run saves, and that a checkpoint that it loads fits it."""

from mft_megatron.arguments.table import Arguments
from mft_megatron.run_folder.description import CheckpointInfo
from mft_megatron.run_folder.names import is_checkpoint


def check_checkpointing(a: Arguments) -> str | None:
    """Check what is saved and exported, and what the run starts from."""
    return _saving_problem(a) or _folder_problem(a) or _loading_problem(a)


def _saving_problem(a: Arguments) -> str | None:
    c = a.checkpoint
    if c.save is None and c.save_interval is not None:
        return "--save-interval without --save: give --save DIR"
    if c.save is None and c.auto_resume:
        return "--auto-resume continues the run of the --save folder: give --save DIR"
    if c.save is None and a.training.exit_interval is not None:
        return "--exit-interval without --save would lose the run: give --save DIR"
    if c.save is None and (a.training.exit_duration_in_mins is not None or a.training.exit_signal_handler):
        name = "--exit-signal-handler" if a.training.exit_signal_handler else "--exit-duration-in-mins"
        return f"{name} without --save would lose the run: give --save DIR"
    if a.bad_steps.on_bad_step == "rollback" and (c.save is None or c.save_interval is None or not c.save_optim):
        return (
            "--on-bad-step rollback goes back to checkpoints of the run with their optimizer's states: give --save DIR "
            "and --save-interval, without --no-save-optim, or take --on-bad-step skip"
        )
    if c.save_retain_interval is not None:
        if c.save_interval is None:
            return f"--save-retain-interval {c.save_retain_interval} without --save-interval: give that, too"
        if c.save_retain_interval % c.save_interval:
            return (
                f"--save-retain-interval {c.save_retain_interval} is not a multiple of --save-interval "
                f"{c.save_interval}; change one of them"
            )
    if c.save_hf is not None and c.save is None:
        return f"--save-hf {c.save_hf} writes the run's last checkpoint, and without --save there is none; give both"
    if c.save_hf_interval is not None:
        if c.save_hf is None or c.save_interval is None:
            missing = "--save-hf DIR" if c.save_hf is None else "--save-interval"
            return f"--save-hf-interval {c.save_hf_interval} without {missing.split()[0]}: give {missing}, too"
        if c.save_hf_interval % c.save_interval:
            return (
                f"--save-hf-interval {c.save_hf_interval} is not a multiple of --save-interval {c.save_interval}, and "
                "only checkpoints are exported; change one of them"
            )
    return None


def _folder_problem(a: Arguments) -> str | None:
    """Check that a run does not replace the checkpoints of another one, or its own whenever its job is restarted."""
    save, load = a.checkpoint.save, a.checkpoint.load
    if save is None or not is_checkpoint(save):
        return None
    if load is None:
        return (
            f"--save {save} holds the checkpoints of another run: add --load {save} or --auto-resume to continue it, "
            "or name another folder"
        )
    if a.resume is None or a.in_own_folder or a.validation.skip_train:
        return None
    without = " without --finetune" if a.checkpoint.finetune else ""
    return (
        f"--save {save} holds the checkpoints of a run already, and --load {load} would begin again and replace them: "
        f"continue with --load {save}{without}, or name another folder"
    )


def _loading_problem(a: Arguments) -> str | None:
    c = a.checkpoint
    if a.validation.skip_train and a.resume is None:
        return "--skip-train evaluates a checkpoint: give one with --load"
    if c.finetune and c.load is None:
        return "--finetune without --load: give the checkpoint to start from"
    if a.adapters is not None and not a.weights_alone and a.resume is not None and a.resume.info.lora is None:
        return (
            f"--peft-type {a.lora.peft_type}: --load {c.load} has no adapters; start from its weights with --finetune"
        )
    if a.resume is None or a.weights_alone:
        return None
    return _resuming_problem(a, a.resume.info)


def _resuming_problem(a: Arguments, info: CheckpointInfo) -> str | None:
    c = a.checkpoint
    nothing_left = info.iteration >= a.training.train_iters and not a.evaluation_due
    if nothing_left and not (a.validation.skip_train or a.finished):
        length = f"--train-iters {a.training.train_iters}: the checkpoint is already at iteration {info.iteration}"
        if a.epoch_packs is not None:
            length = (
                f"--num-train-epochs {a.training.num_train_epochs:g}: the checkpoint has used "
                f"{info.consumed_samples / a.epoch_packs:.3g} epochs already"
            )
        return f"{length}; raise it, or start a new run from its weights with --finetune"
    if c.load_optim and not info.has_optimizer:
        return f"--load {c.load}: saved with --no-save-optim; continue with --no-load-optim or --finetune"
    if c.load_optim and info.format_version < 2:
        return (
            f"--load {c.load}: an earlier version of this program stored its optimizer in another way; continue with "
            "--no-load-optim or --finetune"
        )
    if c.load_optim and info.precision != a.precision.name:
        return (
            f"--load {c.load}: its optimizer is of a {info.precision} run, this one is {a.precision.name}; "
            "use the same precision, or continue with --no-load-optim or --finetune"
        )
    if c.load_optim and info.optimizer != a.optimizer_states:
        return (
            f"--load {c.load}: its optimizer is {info.optimizer}, this run's is {a.optimizer_states}; use the "
            "same, or continue with --no-load-optim or --finetune"
        )
    if c.load_optim and info.decoupled_lr != (a.learning_rate.decoupled_lr is not None):
        was, now = ("saved with", "give it") if info.decoupled_lr else ("saved without", "leave it out")
        return f"--load {c.load}: {was} --decoupled-lr; {now}, or continue with --no-load-optim or --finetune"
    return None
