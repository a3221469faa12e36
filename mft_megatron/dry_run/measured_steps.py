"""How large the steps are that a dry run takes: the largest batch, or what memory needs of it to reach its peak."""

import dataclasses

from mft_megatron.arguments.table import Arguments


def largest_batch(arguments: Arguments) -> int:
    """Rows of the largest global batch of the steps to come."""
    return max(arguments.batch_sizes.remaining(arguments.progress[1]))


def measured_steps(arguments: Arguments, every: bool) -> Arguments:
    """Let each step have the largest global batch, or as much of it as memory needs to reach its peak.

    Args:
        arguments: of the run.
        every: whether all micro-batches are computed.
    """
    rows = largest_batch(arguments)
    if not every:
        rows = min(rows, rows_of_peak(arguments))
    training = dataclasses.replace(
        arguments.training, global_batch_size=rows, rampup_batch_size=None, step_batch_size_schedule=None
    )
    return dataclasses.replace(arguments, training=training)


def rows_of_peak(arguments: Arguments) -> int:
    """Rows of a global batch with which memory reaches its peak: two micro-batches for each pipeline stage.

    A stage of any schedule has fewer in flight, and what a later one needs is what an earlier one needed.
    """
    stages = arguments.distributed.pipeline_model_parallel_size
    return 2 * stages * arguments.training.micro_batch_size * arguments.data_parallel_size
