"""Megatron-Core's data parallelism: wrap model chunks, reduce gradients, gather weights.

::

    backward of the last micro-batch ─► a bucket's gradients are complete ─► reduced; --overlap-grad-reduce: meanwhile
    optimizer step: a rank's shard of the weights ─► gathered at once; --overlap-param-gather: in the next forward pass

Gradients are summed over ranks, never averaged: the objective's coefficients contain the whole normalisation.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from mft_megatron.arguments.table import Arguments


def wrap(arguments: Arguments, models: Sequence[torch.nn.Module]) -> list[DistributedDataParallel]:
    """Wrap this rank's model chunks for data parallelism, with the buffers of gradients."""
    _ignore_warnings()
    trained = sum(p.numel() for model in models for p in model.parameters() if p.requires_grad)
    config = data_parallel_config(arguments, trained)
    chunks = [
        # Only the first chunk's gradients come when no computation is left to hide their reduction.
        DistributedDataParallel(config=model.config, ddp_config=config, module=model, disable_bucketing=index > 0)
        for index, model in enumerate(models)
    ]
    _let_schedule_reduce(arguments, chunks)
    return chunks


def data_parallel_config(arguments: Arguments, num_parameters: int = 0) -> DistributedDataParallelConfig:
    """Build Megatron-Core's configuration of data parallelism.

    Args:
        arguments: all of the run's.
        num_parameters: trained elements of this rank's chunks; only for ``--ddp-num-buckets``, which divides them.
    """
    layout, size = arguments.distributed, arguments.distributed.ddp_bucket_size
    if layout.ddp_num_buckets is not None:
        size = max(num_parameters // layout.ddp_num_buckets, 1)
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=arguments.precision.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=layout.overlap_grad_reduce,
        overlap_param_gather=layout.overlap_param_gather,
        align_param_gather=_aligns_gather(arguments),
        use_distributed_optimizer=layout.use_distributed_optimizer,
        num_distributed_optimizer_instances=layout.num_distributed_optimizer_instances,
        bucket_size=size,
        pad_buckets_for_high_nccl_busbw=layout.ddp_pad_buckets_for_high_nccl_busbw,
        average_in_collective=False,
    )


def _ignore_warnings() -> None:
    """Silence torch about Megatron-Core's use of deprecated collectives and of gradients of weight slices."""
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    warnings.filterwarnings(
        "ignore", message="The .grad attribute of a Tensor that is not a leaf", category=UserWarning
    )


def _aligns_gather(arguments: Arguments) -> bool:
    """Whether the pipeline schedule starts the gathering of weights; only that of interleaved stages can."""
    layout = arguments.distributed
    return layout.overlap_param_gather and layout.align_param_gather and layout.interleaved


def _let_schedule_reduce(arguments: Arguments, chunks: Sequence[DistributedDataParallel]) -> None:
    """Give the pipeline schedule the functions by which it delays reductions until a chunk's last micro-batch."""
    layout = arguments.distributed
    if not layout.overlap_grad_reduce:
        return
    for chunk in chunks:
        chunk.config.no_sync_func = _one_or_all([each.no_sync for each in chunks])
        if layout.align_grad_reduce:
            chunk.config.grad_sync_func = _one_or_all([each.start_grad_sync for each in chunks])


def _one_or_all(functions: list[Callable[..., Any]]) -> Callable[..., Any] | list[Callable[..., Any]]:
    """One function, or the list of them, as Megatron-Core's schedules expect for one or several chunks."""
    return functions[0] if len(functions) == 1 else functions


class WeightGathering:
    """The gathering of weights after a distributed optimizer's step, which updates only each rank's shard of them.

    Without ``--overlap-param-gather`` the optimizer gathers them, and this class does nothing. With it the modules
    gather them in their next forward pass; outside of a forward pass weights may be read only within :meth:`whole`.
    Before the first step every rank has all weights and nothing is gathered, so that a rank that loaded a wrong weight
    does not send it to others.
    """

    def __init__(self, arguments: Arguments, chunks: Sequence[DistributedDataParallel]):
        self._chunks = list(chunks) if arguments.distributed.overlap_param_gather else []
        self._aligned = _aligns_gather(arguments)
        self._overlaps = False
        for chunk in self._chunks:
            chunk.disable_forward_pre_hook(param_sync=False)

    def after_update(self) -> None:
        """Let the next forward pass gather weights; call after each optimizer step."""
        if not self._overlaps:
            self._turn_on()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Give every rank all weights of its chunks, as of the last step; within, forward passes gather nothing."""
        if not self._overlaps:
            yield
            return
        for chunk in self._chunks:
            chunk.disable_forward_pre_hook(param_sync=True)
        try:
            yield
        finally:
            self._turn_on()

    def _turn_on(self) -> None:
        for chunk in self._chunks:
            chunk.enable_forward_pre_hook()
            if self._aligned:
                chunk.config.param_sync_func = _one_or_all([each.start_param_sync for each in self._chunks])
        self._overlaps = bool(self._chunks)
