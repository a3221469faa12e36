"""What is written down about a run."""

import dataclasses

from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class LoggingArguments:
    """Everything logged also goes to metrics.jsonl in the --save folder, in full precision."""

    log_interval: int = option(100, "Log after this many steps.", at_least=1)
    tensorboard_dir: str | None = option(
        None, "TensorBoard folder. Not given: tensorboard/ in the --save folder.", type=str, metavar="DIR"
    )
    wandb_project: str | None = option(
        None, "Log to this project of Weights & Biases, too; needs pip install wandb.", type=str, metavar="NAME"
    )
    wandb_exp_name: str | None = option(
        None, "Name of the run there. Not given: the --save folder's name.", type=str, metavar="NAME"
    )
