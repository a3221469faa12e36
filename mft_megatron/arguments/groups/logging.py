"""Options of the log."""

import dataclasses

from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class LoggingArguments:
    """Everything logged also goes to metrics.jsonl in the --save folder, in full precision."""

    log_interval: int = option(100, "Log after this many steps.", at_least=1)
    tensorboard_dir: str | None = option(
        None, "TensorBoard folder. Not given: tensorboard/ in the --save folder.", metavar="DIR"
    )
    tensorboard_log_interval: int | None = option(
        None,
        "Write steps to TensorBoard and Weights & Biases after this many. Unlike in Megatron, where it is 1, the "
        "default is --log-interval.",
        at_least=1,
    )
    tensorboard_queue_size: int = option(1000, "Values that TensorBoard may hold back before it writes.", at_least=1)
    log_validation_ppl_to_tensorboard: bool = option(
        False, "Also write the tasks' perplexities to TensorBoard; metrics.jsonl always has them."
    )
    log_world_size_to_tensorboard: bool = option(False, "Write the number of ranks to TensorBoard with each step.")
    log_memory_to_tensorboard: bool = option(
        False, "Write the main rank's memory to TensorBoard with each step: of the GPU, or resident memory."
    )
    log_params_norm: bool = option(False, "Also log the L2 norm of all weights.")
    log_throughput: bool = option(
        False,
        "Also log TFLOP/s of each rank. Unlike in Megatron attention is counted with the actual lengths of samples, "
        "not with --seq-length.",
    )
    wandb_entity: str | None = option(None, "Team that owns the project there.", metavar="NAME")
    wandb_save_dir: str | None = option(None, "Folder of wandb's files. Not given: the --save folder.", metavar="DIR")
    wandb_project: str | None = option(
        None, "Also log to this project of Weights & Biases; needs pip install wandb.", metavar="NAME"
    )
    wandb_exp_name: str | None = option(
        None, "Name of the run there. Not given: the --save folder's name.", metavar="NAME"
    )
    log_num_zeros_in_grad: bool = option(False, "Log how many elements of the gradients are 0.")
