"""Megatron-Core distributed checkpoints: write one, load one into any layout.

A save is complete when its description (``mft_checkpoint.json``) and then the tracker file have been renamed into
place; what was interrupted before is not loaded. Random-number states belong to a layout and are restored only into the
same.
"""

import contextlib
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from mft_megatron.arguments import CheckpointArguments
from mft_megatron.errors import InputError
from mft_megatron.losses.focal import TaskStatistics
from mft_megatron.run_folder import TRACKER, CheckpointInfo, iteration_folder, replace_text, write_info

from . import parallel, platform
from .optimizer import restore_optimizer
from .step import Trainer
from .tensor_reader import TensorReader


def save(
    folder: Path,
    trainer: Trainer,
    info: CheckpointInfo,
    options: CheckpointArguments,
    training_state: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of all ranks and make it the newest of the run.

    Args:
        folder: the run folder, ``--save``.
        trainer: what to save.
        info: description of the checkpoint; its iteration names the folder.
        options: whether the optimizer and the random-number state are part of it.
        training_state: what the run remembers besides; CPU tensors, numbers, strings, lists and dicts, the same on
            every rank.

    Returns:
        the checkpoint's folder.
    """
    path = iteration_folder(folder, info.iteration)
    if parallel.is_main():
        shutil.rmtree(path, ignore_errors=True)  # left by an interrupted save, or by a run that is being repeated
        path.mkdir(parents=True)
    parallel.wait()
    model_state = _model_state(trainer)
    state = {
        "model": model_state,
        "scheduler": trainer.scheduler.state_dict(),
        "statistics": {name: value.cpu() for name, value in vars(trainer.statistics).items()},
        "training": training_state or {},
    }
    if options.save_optim and info.optimizer_steps:
        state["optimizer"] = trainer.optimizer.sharded_state_dict(model_state)
    if options.save_rng:
        state["rng"] = _rng_object(_rng_state())
    with _quiet():
        dist_checkpointing.save(state, str(path), sharded_strategy=TorchDistSaveShardedStrategy("torch_dist", 1))
    parallel.wait()
    if parallel.is_main():
        write_info(path, info)
        replace_text(folder / TRACKER, f"{info.iteration}\n")
    parallel.wait()
    return path


def load(path: Path, trainer: Trainer, info: CheckpointInfo, options: CheckpointArguments) -> dict[str, Any]:
    """Load a checkpoint written at any layout into the trainer, in place.

    With ``--finetune`` only the weights; else also the optimizer, the schedule, the statistics of the focal loss and,
    on the same layout, the random-number state, unless the options leave them out.

    Returns:
        the ``training_state`` that :func:`save` was given; empty with ``--finetune``.

    Raises:
        InputError: the checkpoint does not hold what this model needs.
    """
    model_state = _model_state(trainer)
    state = {"model": model_state}
    TensorReader(path)  # says in one line if the index is damaged; Megatron-Core would go on without it for a while
    whole = not options.finetune
    with_optimizer = whole and options.load_optim and info.has_optimizer and info.optimizer_steps > 0
    with_rng = whole and options.load_rng and info.has_rng and info.layout == parallel.layout()
    if with_optimizer:
        state["optimizer"] = trainer.optimizer.sharded_state_dict(model_state, is_loading=True)
    if with_rng:
        state["rng"] = _rng_object(None)
    try:
        with _quiet():
            loaded = dist_checkpointing.load(state, str(path))
    except (Exception, CheckpointException) as error:  # torch's is no Exception
        rank = torch.distributed.get_rank()
        raise InputError(f"{path}: rank {rank} cannot load it ({_reason(error)})", always=True) from error
    for name, chunk in _named_chunks(trainer):
        chunk.load_state_dict(loaded["model"][name])
    if whole and options.load_optim:
        trainer.scheduler.load_state_dict(loaded["scheduler"])
    if with_optimizer:
        restore_optimizer(trainer.optimizer, loaded["optimizer"])
        trainer.scheduler.step(increment=0)
    else:
        trainer.optimizer.reload_model_params()
    if with_rng:
        _set_rng_state(loaded["rng"])
    if whole and "statistics" in loaded:
        there = {name: value.to(platform.device()) for name, value in loaded["statistics"].items()}
        trainer.statistics = TaskStatistics(**there)
    return loaded.get("training", {}) if whole else {}


def _named_chunks(trainer: Trainer) -> Iterator[tuple[str, torch.nn.Module]]:
    return ((f"chunk{number}", chunk.module) for number, chunk in enumerate(trainer.chunks))


def _model_state(trainer: Trainer) -> dict[str, dict]:
    """Weights by chunk; the keys under which they are stored know the layers of the whole model, not the chunks."""
    return {name: chunk.sharded_state_dict() for name, chunk in _named_chunks(trainer)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Megatron-Core writes through parts of torch that announce their successors on every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _reason(error: BaseException) -> str:
    """What went wrong, in a line; of torch's collection of every rank's failures the first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    text = str(error).strip() or "no further word"
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"


def _rng_object(state: dict | None) -> ShardedObject:
    """One state per pipeline and tensor-parallel rank and data-parallel replica."""
    shape = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
    )
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )
    return ShardedObject("rng", state, shape, place, replica_id=0)


def _rng_state() -> dict:
    return {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state() if platform.HAS_CUDA else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if platform.HAS_CUDA and state["device"] is not None:
        torch.cuda.set_rng_state(state["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
