"""What is saved and loaded."""

import dataclasses

from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class CheckpointArguments:
    """Megatron-Core distributed checkpoints: whatever layout wrote one, any other loads it."""

    save: str | None = option(None, "Run folder: checkpoints, metrics, configuration.", type=str, metavar="DIR")
    save_interval: int | None = option(
        None,
        "Save after this many steps; the last step is always saved.",
        type=int,
        aliases=("--persistent-save-interval",),
        at_least=1,
    )
    load: str | None = option(
        None,
        "Continue from the newest checkpoint of this folder (or from one iter_NNNNNNN folder). Unlike in Megatron a "
        "folder without a checkpoint is an error, except when it is also the --save folder: then the run starts anew.",
        type=str,
        metavar="DIR",
    )
    finetune: bool = option(False, "Load the weights alone and start at iteration 0 with a fresh optimizer.")
    save_optim: bool = option(True, "Leave the optimizer out of checkpoints.", flag="--no-save-optim")
    load_optim: bool = option(True, "Do not load the optimizer from the checkpoint.", flag="--no-load-optim")
    save_rng: bool = option(True, "Leave the random-number state out of checkpoints.", flag="--no-save-rng")
    load_rng: bool = option(True, "Do not load the random-number state.", flag="--no-load-rng")
    save_best: bool = option(
        False,
        "Also save at the evaluation that is best by --early-stopping-metric so far, and keep that checkpoint: "
        "best_checkpointed_iteration.txt in the --save folder names it.",
    )
    ckpt_format: str = option("torch_dist", "Format of checkpoints.", choices=("torch_dist",))
