"""A micro-batch on this process's device, with the part of it that this rank computes."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses

import numpy as np
import torch
from torch import Tensor

from mft_megatron.batch import Batch
from mft_megatron.mcore.platform import devices

from .context_parallel import ContextParallelShard, shard_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceBatch(Batch[Tensor]):
    """A micro-batch of tensors.

    Attributes:
        shard: the part of it that this context-parallel rank computes. It is derived from the arrays on the host, so
            that nothing waits for the device.
    """

    shard: ContextParallelShard


def to_device(batch: Batch[np.ndarray]) -> DeviceBatch:
    """Copy a micro-batch to this process's device; the host does not wait for it."""
    device = devices.device()
    tensors = {
        field.name: torch.from_numpy(value).to(device, non_blocking=True)
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), np.ndarray)
    }
    return DeviceBatch(**tensors, max_seqlen=batch.max_seqlen, shard=shard_of(batch, device))
