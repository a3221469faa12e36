"""Shapes of the messages between pipeline stages where micro-batches differ in width, known without a message.

Every rank builds its micro-batches from the plan, so it knows the width of each one that it will receive::

    widths of the micro-batches ─┬─► inputs, in the order in which this rank computes its forward passes
                                 └─► gradients, in the order of its backward passes
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from collections.abc import Sequence

from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.transformer_config import TransformerConfig

from mft_megatron.mcore.platform.pipeline_messages import MessageShapes


def message_shapes(config: TransformerConfig, tokens: Sequence[int]) -> MessageShapes:
    """List what this rank receives in one run of the pipeline's schedule.

    Args:
        config: of the model.
        tokens: of each of this rank's micro-batches, as one stream for all context-parallel ranks.
    """
    ranks = parallel_state.get_context_parallel_world_size()
    if config.sequence_parallel:
        ranks *= parallel_state.get_tensor_model_parallel_world_size()
    chunks = config.virtual_pipeline_model_parallel_size
    received = _received(
        len(tokens),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        chunks,
        None if chunks is None else config.microbatch_group_size_per_vp_stage,
    )
    shapes = [(length // ranks, 1, config.hidden_size) for length in tokens]
    inputs, gradients = ([shapes[index] for index in indices] for indices in received)
    return MessageShapes(iter(inputs), iter(gradients))


def _received(
    micro_batches: int, stage: int, stages: int, chunks: int | None, group_size: int | None
) -> tuple[list[int], list[int]]:
    """Micro-batches whose inputs and whose gradients a rank receives, in order.

    Args:
        micro_batches: how many.
        stage: of the rank, from 0.
        stages: ranks of the pipeline.
        chunks: of the model on each rank; ``None`` where stages are not interleaved.
        group_size: micro-batches that pass through a chunk before the next chunk computes them.
    """
    if chunks is None:
        order = list(range(micro_batches))
        return order if stage else [], order if stage < stages - 1 else []
    table = get_schedule_table(micro_batches, chunks, group_size)
    first, last = stage == 0, stage == stages - 1
    inputs = [index for index, chunk in table if not (first and chunk == 0)]
    # backward passes take the chunks in the reverse order
    gradients = [index for index, chunk in table if not (last and chunk == 0)]
    return inputs, gradients
