"""Random-number states of all ranks in a checkpoint; they belong to one parallel layout."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from typing import TypedDict

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor

from mft_megatron.mcore.platform import devices


class RandomState(TypedDict):
    """States of one rank, each uint8 [bytes of the state].

    ``cpu``: torch's CPU generator. ``device``: that of the CUDA device, ``None`` without CUDA. ``tracker``: the states
    of Megatron-Core's tracker by name, for dropout under tensor parallelism.
    """

    cpu: Tensor
    device: Tensor | None
    tracker: dict[str, Tensor]


def random_state() -> RandomState:
    """Read this rank's states."""
    return {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state() if devices.HAS_CUDA else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def set_random_state(state: RandomState) -> None:
    """Set this rank's states."""
    torch.set_rng_state(state["cpu"])
    if devices.HAS_CUDA and state["device"] is not None:
        torch.cuda.set_rng_state(state["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


def sharded_random_state(state: RandomState | None) -> ShardedObject:
    """Make this rank's states an entry of a sharded state dict; ``None`` to load into it.

    There is one state per pipeline rank, tensor-parallel rank and rank of data and context parallelism.
    """
    shape = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    )
    index = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return ShardedObject("rng", state, shape, index, replica_id=0)
