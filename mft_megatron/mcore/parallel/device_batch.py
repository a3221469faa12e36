"""A micro-batch on this process's device, with the part of it that this rank computes."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from mft_megatron.batch import Batch
from mft_megatron.mcore.platform import devices

from .context_parallel import ContextParallelShard, shard_of
from .host_copies import copy_together

# what a pipeline stage reads: every stage, that with the embedding, and that with the output layer
_EVERYWHERE = {"position_ids_BS", "lengths_B"}
_EMBEDDING = {"tokens_BS"}
_OUTPUT = {
    "labels_BS",
    "loss_mask_BS",
    "sample_ids_BS",
    "task_ids_BS",
    "token_weights_BS",
    "sample_weights_BS",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceBatch(Batch[Tensor]):
    """A micro-batch of tensors; ids, positions and lengths are int32.

    A tensor that no stage of this rank reads is on the meta device: it has a shape and no content, and a computation
    with it fails. ``cu_seqlens`` stays on the host.

    Attributes:
        shard: the part of it that this context-parallel rank computes. It is derived from the arrays on the host, so
            that nothing waits for the device.
    """

    shard: ContextParallelShard


def to_device(batch: Batch[np.ndarray]) -> DeviceBatch:
    """Copy what this rank reads of a micro-batch to its device, in one copy that the host does not wait for."""
    device, read = devices.device(), _read_here()
    shard = shard_of(batch, torch.device("cpu"))
    fields = {name: value for name, value in vars(batch).items() if isinstance(value, np.ndarray)}
    copied = {name: fields[name] for name in fields if name in read}
    indices = shard.tensors()
    tensors = copy_together(
        [*copied.values(), *(index.numpy() for index in indices)],
        [*(_dtype(array) for array in copied.values()), *(index.dtype for index in indices)],
        device,
    )
    absent = {name: _without_content(array) for name, array in fields.items() if name not in read}
    absent["cu_seqlens"] = torch.from_numpy(batch.cu_seqlens)
    return DeviceBatch(
        **{**absent, **dict(zip(copied, tensors, strict=False))},
        max_seqlen=batch.max_seqlen,
        shard=shard.with_tensors(tensors[len(copied) :]),
    )


def _read_here() -> set[str]:
    """Names of the arrays that a stage of this rank reads, in any of its chunks."""
    read = set(_EVERYWHERE)
    if parallel_state.is_pipeline_first_stage():
        read |= _EMBEDDING
    if parallel_state.is_pipeline_last_stage():
        read |= _OUTPUT
    return read


def _dtype(array: np.ndarray) -> torch.dtype:
    """Dtype that an array has on the device: int32 instead of int64, since ids and positions fit."""
    dtype = torch.from_numpy(array).dtype
    return torch.int32 if dtype == torch.int64 else dtype


def _without_content(array: np.ndarray) -> Tensor:
    return torch.empty(1, dtype=_dtype(array), device="meta").expand(array.shape)
