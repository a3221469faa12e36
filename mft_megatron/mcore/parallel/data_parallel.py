"""Megatron-Core's data parallelism: how chunks are wrapped, when gradients are reduced and when weights are whole.

::

    backward of the last micro-batch ─► a bucket's gradients are there ─► reduced, with --overlap-grad-reduce meanwhile
    optimizer step: a rank's part of the weights ─► gathered at once, or with --overlap-param-gather in the next forward

Gradients are summed over ranks, never averaged: the objective has its whole normalisation in itself.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from mft_megatron.arguments.table import Arguments


def wrap(arguments: Arguments, models: Sequence[torch.nn.Module]) -> list[DistributedDataParallel]:
    """This rank's chunks of the model, with buffers of gradients and, if that is distributed, for the optimizer."""
    _quiet()
    trained = sum(p.numel() for model in models for p in model.parameters() if p.requires_grad)
    config = data_parallel_config(arguments, trained)
    chunks = [
        # only the first chunk's gradients come last, with nothing left to compute meanwhile
        DistributedDataParallel(config=model.config, ddp_config=config, module=model, disable_bucketing=number > 0)
        for number, model in enumerate(models)
    ]
    _let_schedule_reduce(arguments, chunks)
    return chunks


def data_parallel_config(arguments: Arguments, num_parameters: int = 0) -> DistributedDataParallelConfig:
    """Megatron-Core's configuration.

    Args:
        arguments: of the whole run.
        num_parameters: that are trained, of this rank's chunks, which ``--ddp-num-buckets`` divides.
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


def _quiet() -> None:
    """Megatron-Core uses collectives whose successors torch announces, and looks for gradients of pieces of weights."""
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    warnings.filterwarnings(
        "ignore", message="The .grad attribute of a Tensor that is not a leaf", category=UserWarning
    )


def _aligns_gather(arguments: Arguments) -> bool:
    """Only the schedule of interleaved stages gathers on behalf of them."""
    layout = arguments.distributed
    return layout.overlap_param_gather and layout.align_param_gather and layout.interleaved


def _let_schedule_reduce(arguments: Arguments, chunks: Sequence[DistributedDataParallel]) -> None:
    """Tell the pipeline schedule how to hold reductions back until a chunk's last micro-batch."""
    layout = arguments.distributed
    if not layout.overlap_grad_reduce:
        return
    for chunk in chunks:
        chunk.config.no_sync_func = _one_or_all([each.no_sync for each in chunks])
        if layout.align_grad_reduce:
            chunk.config.grad_sync_func = _one_or_all([each.start_grad_sync for each in chunks])


def _one_or_all(functions: list):
    return functions[0] if len(functions) == 1 else functions


class WeightGathering:
    """Who gathers weights after a step of an optimizer that left each rank with its part of them.

    Without ``--overlap-param-gather`` the optimizer does, and all of this does nothing. With it the modules do, in
    their next forward pass: outside of one, weights are not to be read but within :meth:`whole`. Before the first
    step every rank has all weights and nothing is gathered, so that one that was loaded wrong is not handed on.
    """

    def __init__(self, arguments: Arguments, chunks: Sequence[DistributedDataParallel]):
        self._chunks = list(chunks) if arguments.distributed.overlap_param_gather else []
        self._aligned = _aligns_gather(arguments)
        self._overlaps = False
        for chunk in self._chunks:
            chunk.disable_forward_pre_hook(param_sync=False)

    def after_update(self) -> None:
        """The optimizer has stepped."""
        if not self._overlaps:
            self._turn_on()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Every rank has all weights of its chunks, as of the last step; forward passes gather nothing."""
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
