"""Process groups and Megatron's model-parallel ranks: start them, ask them, destroy them."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import contextlib
import datetime
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from mft_megatron.arguments.groups.distributed import DistributedArguments
from mft_megatron.batch import Ranks
from mft_megatron.disk_errors import explain, named_file
from mft_megatron.errors import InputError
from mft_megatron.mcore.platform import devices

from . import flight_recorder, rendezvous, teardown, timeouts

T = TypeVar("T")


@contextlib.contextmanager
def process_groups(layout: DistributedArguments, seed: int) -> Iterator[None]:
    """Start the process groups of a parallel layout and seed this rank; destroy the groups at the end.

    Ranks come from torchrun's environment; without it the process is a world of one. Dropout in regions that tensor
    parallelism splits differs between its ranks; everywhere else it is the same, as in Megatron.

    Args:
        layout: sizes of the groups, backend and timeout.
        seed: ``--seed``; each pipeline stage adds 100 times its rank.

    Raises:
        InputError: Megatron-Core lacks a package that this layout needs, or the ranks do not reach each other.
    """
    devices.use_device()
    if layout.num_distributed_optimizer_instances > 1 and importlib.util.find_spec("einops") is None:
        raise InputError(
            "--num-distributed-optimizer-instances: Megatron-Core makes its groups of ranks with einops; install that "
            "with pip install einops, or leave the option out"
        )
    started, timeout = not dist.is_initialized(), timeouts.begin(layout.collective_minutes, layout.start_timeout)
    if started:
        if devices.HAS_CUDA:
            flight_recorder.keep(os.environ)
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
            os.environ.setdefault(name, value)
        attempt = rendezvous.store_of_attempt(os.environ, timeout)
        dist.init_process_group(devices.backend(layout.distributed_backend), timeout=timeout, **attempt)
    try:
        if started:
            _connect()
        _start_model_parallel(layout, timeout)
        stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
        torch.manual_seed(stage_seed)
        tensor_parallel.model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)
        yield
    except BaseException:
        if not started or not teardown.end_after_error():
            _end(started)
        raise
    _end(started)


def _connect() -> None:
    """Let the ranks exchange a number, so that they connect now, on the devices that they have chosen.

    NCCL connects in the first collective, and torch lets a barrier take the device of the first one. Naming the device
    when the group is made would do both, but then every other group is split from this one, and the messages of a
    pipeline share a communicator with each other.

    Raises:
        InputError: NCCL cannot connect the ranks.
    """
    # Megatron-Core's barriers, which name no device
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    try:
        any_rank(False)
    except dist.DistBackendError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(
            f"the processes of this run cannot connect to each other: {lines[-1] if lines else 'no reason is given'}; "
            "NCCL_DEBUG=WARN in the environment shows more. Is there one GPU for each process, and a network interface "
            "that all nodes have (NCCL_SOCKET_IFNAME)?",
            always=True,
        ) from error


def _start_model_parallel(layout: DistributedArguments, timeout: datetime.timedelta) -> None:
    """Start Megatron-Core's groups of a parallel layout, with this timeout of their collectives."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.num_virtual_stages_per_pipeline_rank,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        num_distributed_optimizer_instances=layout.num_distributed_optimizer_instances,
        # Only an optimizer that is not used here needs the gloo copy of each data-parallel group.
        create_gloo_process_groups=False,
        distributed_timeout_minutes=int(timeout.total_seconds() / 60),
    )


def _end(started: bool) -> None:
    """End Megatron-Core's groups, and torch's too if they were started here; waits for the other ranks with NCCL."""
    parallel_state.destroy_model_parallel()
    if started:
        dist.destroy_process_group()


def ranks() -> Ranks:
    """This process's rank and size of data parallelism; context-parallel ranks of the same data have the same rank."""
    return Ranks(parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size())


def parallel_layout() -> dict[str, int | str]:
    """Sizes of this run's parallel layout by name, and the type of its device.

    A checkpoint's random-number states are only loaded where all of these are the same.
    """
    return {
        "device": devices.device().type,
        "world": dist.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "expert tensor": parallel_state.get_expert_tensor_parallel_world_size(),
    }


def position() -> dict[str, int]:
    """This rank's position in its groups, by the group's name."""
    return {
        "tensor": parallel_state.get_tensor_model_parallel_rank(),
        "pipeline": parallel_state.get_pipeline_model_parallel_rank(),
        "context": parallel_state.get_context_parallel_rank(),
        "data": parallel_state.get_data_parallel_rank(),
        "expert": parallel_state.get_expert_model_parallel_rank(),
    }


def is_main() -> bool:
    """Whether this process writes the log and the run folder."""
    return dist.get_rank() == 0


def is_last_stage() -> bool:
    """Whether this process has the output layer; where stages are interleaved, in the last of its chunks."""
    return parallel_state.is_pipeline_last_stage()


def reports_losses() -> bool:
    """Whether this process adds losses to the report of a step: one tensor-parallel rank of the last pipeline stage.

    Each context-parallel rank adds those of its tokens.
    """
    return is_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0


def sum_over_world(value: Tensor) -> Tensor:
    """Sum a tensor of any shape and dtype, on this process's device, over all processes, in place; returns it."""
    dist.all_reduce(value)
    return value


def sum_over_data(values: np.ndarray) -> np.ndarray:
    """Sum an int64 array of any shape over the data-parallel ranks; the argument is not changed."""
    total = torch.from_numpy(values).to(devices.device(), copy=True)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total.cpu().numpy()


def any_rank(value: bool) -> bool:
    """Whether ``value`` is true on any process."""
    # filled on the device: a value that is copied there would be waited for
    return sum_over_world(torch.full((), int(value), device=devices.device())).item() > 0


def raise_on_all_ranks(refusal: str | InputError | None) -> None:
    """Raise on every rank what a rank refuses, so that none waits for another; a collective of all ranks.

    Args:
        refusal: the message of this rank, or the error with its exit code; ``None`` without one.

    Raises:
        InputError: a rank has a message: the first one, with its exit code, the same on all ranks.
    """
    error = InputError(refusal) if isinstance(refusal, str) else refusal
    first = first_of_any_rank(None if error is None else (str(error), error.code))
    if first is not None:
        message, code = first
        raise InputError(message, code=code)


def first_of_any_rank(message: T | None) -> T | None:
    """The message of the first rank that has one, the same on all ranks; ``None`` without one; a collective."""
    if not any_rank(message is not None):
        return None
    return next(found for found in of_all_ranks(message) if found is not None)


def of_all_ranks(value: T) -> list[T]:
    """The value of each rank, which can be pickled, in the order of the ranks; a collective."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def object_from_main(value: T) -> T:
    """Send the main process's object, which can be pickled, to every process; returns it; a collective."""
    values = [value]
    dist.broadcast_object_list(values, src=0, device=devices.device())
    return values[0]


def broadcast_from_main(value: Tensor) -> Tensor:
    """Send the main process's CPU tensor, of any shape and dtype, to every process; returns it."""
    on_device = value.to(devices.device())
    dist.broadcast(on_device, src=0)
    return on_device.cpu()


def write_on_main(place: Path, write: Callable[[], object], consequence: str) -> None:
    """Write files on the main process alone, while the others wait; a collective of all processes.

    Args:
        place: the file or folder that is written.
        write: writes it.
        consequence: of an error, for the message.

    Raises:
        InputError: it cannot be written; on every process.
    """
    problem = None
    with timeouts.long_waits():
        if is_main():
            try:
                write()
            except OSError as error:
                problem = f"{named_file(error) or place}: cannot be written: {explain(error, place)}; {consequence}"
        raise_on_all_ranks(problem)


def barrier() -> None:
    """Wait for all processes."""
    device = devices.device()
    dist.barrier(device_ids=[device.index] if device.type == "cuda" and dist.get_backend() == "nccl" else None)
