"""Options of saving and loading."""

import dataclasses

from mft_megatron.options import option
from mft_megatron.run_folder.verification import AUTO, LEVELS


@dataclasses.dataclass(frozen=True)
class CheckpointArguments:
    """Megatron-Core distributed checkpoints: any parallel layout loads what another one wrote."""

    save: str | None = option(
        None,
        "Run folder: checkpoints, metrics, configuration, and outcome.json, which has the exit code of the newest "
        "start and its reason.",
        metavar="DIR",
    )
    save_interval: int | None = option(
        None,
        "Save after this many steps; the last step is always saved.",
        aliases=("--persistent-save-interval",),
        at_least=1,
    )
    load: str | None = option(
        None,
        "Continue from the newest checkpoint of this folder (or from one iter_NNNNNNN folder). Unlike in Megatron a "
        "folder without a checkpoint is an error, except when it is also the --save folder: then the run starts at "
        "iteration 0.",
        metavar="DIR",
    )
    auto_resume: bool = option(
        False,
        "Continue from the newest complete checkpoint in the --save folder, if there is one; else start as the other "
        "options say: --load of another folder, --finetune, --ckpt-step, --no-load-optim, --no-load-rng, "
        "--hf-checkpoint and --pretrained-checkpoint then count for the first start alone. The same command line "
        "starts a job and starts it again. Not Megatron's.",
    )
    verify_checkpoint: str = option(
        AUTO,
        "Compare the files of a checkpoint with their sizes and hashes before it is loaded: full reads all of them, "
        "auto up to 16 GiB for each rank and above that so many pieces at random, sizes none. A damaged newest "
        "checkpoint of a --load folder is named, and the one before it loaded; one that is asked for by its iteration "
        "is refused. Not Megatron's.",
        choices=LEVELS,
    )
    ckpt_step: int | None = option(
        None, "Load this iteration of the --load folder, not the newest.", at_least=0, metavar="ITERATION"
    )
    pretrained_checkpoint: str | None = option(
        None,
        "Start from the weights of this checkpoint, as with --load and --finetune, where --load has none: give it "
        "with --save and --load of one folder, and a restarted job continues from there.",
        metavar="DIR",
    )
    hf_checkpoint: str | None = option(
        None,
        "Start from the model of this Hugging Face folder (config.json and safetensors files) where --load has no "
        "checkpoint; ranks that hold the same shards share the reading. Not Megatron's.",
        metavar="DIR",
    )
    save_hf: str | None = option(
        None,
        "When the run ends, also write its last checkpoint as a Hugging Face model: DIR/iter_NNNNNNN. Not Megatron's.",
        metavar="DIR",
    )
    save_hf_interval: int | None = option(
        None,
        "Also write the checkpoints of iterations divisible by this to --save-hf, in a background process; a "
        "multiple of --save-interval. Not Megatron's.",
        at_least=1,
    )
    exit_on_missing_checkpoint: bool = option(
        False, "A --load folder without a checkpoint is an error even if it is also the --save folder."
    )
    save_retain_interval: int | None = option(
        None,
        "Keep only checkpoints of iterations divisible by this, the newest (or as many as --keep-last), and with "
        "--save-best the best; others are removed when the next one is complete.",
        at_least=1,
    )
    keep_last: int | None = option(
        None,
        "Keep only this many of the newest checkpoints, those of --save-retain-interval, and with --save-best the "
        "best; others are removed when the next one is complete and on the disk. Not Megatron's.",
        at_least=1,
    )
    finetune: bool = option(False, "Load only the weights and start at iteration 0 with a fresh optimizer.")
    save_optim: bool = option(True, "Leave the optimizer out of checkpoints.", flag="--no-save-optim")
    load_optim: bool = option(
        True,
        "Start with fresh optimizer states instead of those of the checkpoint. Unlike in Megatron the schedules of "
        "learning rate and weight decay continue at the checkpoint's iteration; --finetune starts them again.",
        flag="--no-load-optim",
    )
    save_rng: bool = option(True, "Leave the random-number state out of checkpoints.", flag="--no-save-rng")
    load_rng: bool = option(True, "Do not load the random-number state.", flag="--no-load-rng")
    save_best: bool = option(
        False,
        "Also save at the evaluation that is best by --early-stopping-metric so far, and keep that checkpoint: "
        "best_checkpointed_iteration.txt in the --save folder names it.",
    )
    dist_ckpt_optim_fully_reshardable: bool = option(
        False,
        "Always on here, off by default in Megatron: the states of the distributed optimizer are stored by weight, "
        "so that any parallel layout loads them, with the distributed optimizer or without.",
    )
    ckpt_fully_parallel_save: bool = option(
        True,
        "Let only the first data-parallel rank write what all of them hold, instead of sharing the writing.",
        flag="--no-ckpt-fully-parallel-save",
    )
    ckpt_fully_parallel_load: bool = option(
        False,
        "Always on here, off by default in Megatron: each data-parallel rank reads a part of what all of them need and "
        "sends it to the others.",
    )
    async_save: bool = option(
        False,
        "Write checkpoints in the background while training continues; the previous one is finished first. Unlike in "
        "Megatron the writers end with each checkpoint; there are no persistent ones.",
    )
    ckpt_format: str = option("torch_dist", "Format of checkpoints.", choices=("torch_dist",))
