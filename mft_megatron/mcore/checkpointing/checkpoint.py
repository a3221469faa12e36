"""Megatron-Core distributed checkpoints: write one, load one into any layout.

A save is complete when its description (``mft_checkpoint.json``) and then the tracker file have been renamed into
place; what was interrupted before is not loaded. Random-number states belong to a layout and are restored only into the
same.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from mft_megatron.arguments.groups.checkpointing import CheckpointArguments
from mft_megatron.errors import InputError
from mft_megatron.lora import is_adapter
from mft_megatron.losses.focal import TaskStatistics
from mft_megatron.mcore.optim.checkpointed_state import restore, stored_state, wanted_state
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.trainer import Trainer
from mft_megatron.run_folder import TRACKER, CheckpointInfo, iteration_folder, replace_text, write_info

from .tensor_reader import TensorReader


class Writer:
    """Writes checkpoints, one after the other; with ``--async-save`` in the background.

    In the background processes of their own write what the weights and states were. All ranks then find out together,
    in :meth:`poll` or :meth:`finish`, that they have; a checkpoint counts from then on.
    """

    def __init__(self, options: CheckpointArguments, with_base: bool = True):
        """
        Args:
            options: how to write, and whether the optimizer and the random-number state are part of checkpoints.
            with_base: whether all weights are, or those of adapters alone.
        """
        self._options, self._with_base = options, with_base
        self._queue = AsyncCallsQueue() if options.async_save else None
        self._now = ""

    def save(
        self,
        folder: Path,
        trainer: Trainer,
        info: CheckpointInfo,
        training_state: dict[str, Any] | None = None,
        when_complete: Callable[[], None] | None = None,
    ) -> Path:
        """Write a checkpoint of all ranks and make it the newest of the run, after the one before is complete.

        Args:
            folder: the run folder, ``--save``.
            trainer: what to save.
            info: description of the checkpoint; its iteration names the folder.
            training_state: what the run remembers besides; CPU tensors, numbers, strings, lists and dicts, the same on
                every rank.
            when_complete: called on every rank when the checkpoint is the newest.

        Returns:
            the checkpoint's folder, complete unless it is written in the background.
        """
        self.finish()
        path = iteration_folder(folder, info.iteration)
        if process_groups.is_main():
            shutil.rmtree(path, ignore_errors=True)  # left by an interrupted save, or by a run that is being repeated
            path.mkdir(parents=True)
        process_groups.barrier()

        def complete() -> None:
            process_groups.barrier()
            if process_groups.is_main():
                write_info(path, info)
                replace_text(folder / TRACKER, f"{info.iteration}\n")
            process_groups.barrier()
            if when_complete is not None:
                when_complete()

        self._now = str(path)
        with trainer.weights.whole(), _quiet():
            state = _state(trainer, self._options, training_state, self._with_base)
            request = dist_checkpointing.save(
                state,
                str(path),
                sharded_strategy=_save_strategy(self._options),
                async_sharded_save=self._queue is not None,
            )
            if self._queue is not None:
                request.add_finalize_fn(complete)
                self._queue.schedule_async_request(request)
        if self._queue is None:
            complete()
        return path

    def poll(self) -> None:
        """Complete a checkpoint that has been written meanwhile. Every rank calls it at the same steps."""
        self._complete(blocking=False)

    def finish(self) -> None:
        """Wait for what is being written and complete it. Every rank calls it."""
        self._complete(blocking=True)

    def _complete(self, blocking: bool) -> None:
        """
        Raises:
            InputError: writing failed; the newest checkpoint is the one before.
        """
        if self._queue is None or not self._queue.get_num_unfinalized_calls():
            return
        try:
            with _quiet():
                self._queue.maybe_finalize_async_calls(blocking)
        except (OSError, CheckpointException) as error:  # torch's is no Exception
            raise InputError(
                f"{self._now}: cannot be written in the background ({_reason(error)}); the checkpoint before it is "
                "still the newest of the run"
            ) from error


def save(
    folder: Path,
    trainer: Trainer,
    info: CheckpointInfo,
    options: CheckpointArguments,
    training_state: dict[str, Any] | None = None,
    with_base: bool = True,
) -> Path:
    """Write a single checkpoint, as :meth:`Writer.save` does, and wait until it is complete."""
    writer = Writer(options, with_base)
    path = writer.save(folder, trainer, info, training_state)
    writer.finish()
    return path


def _state(
    trainer: Trainer, options: CheckpointArguments, training_state: dict[str, Any] | None, with_base: bool
) -> dict[str, Any]:
    model_state = _model_state(trainer, with_base)
    state = {
        "model": model_state,
        "scheduler": trainer.scheduler.state_dict(),
        "statistics": {name: value.cpu() for name, value in vars(trainer.statistics).items()},
        "training": training_state or {},
    }
    if options.save_optim:
        state["optimizer"] = stored_state(trainer.optimizer, model_state)
    if options.save_rng:
        state["rng"] = _rng_object(_rng_state())
    return state


def _save_strategy(options: CheckpointArguments):
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1)
    if not options.ckpt_fully_parallel_save:
        return strategy
    return FullyParallelSaveStrategyWrapper(strategy, _replicas())


def _load_strategy(path: Path, options: CheckpointArguments):
    if not options.ckpt_fully_parallel_load:
        return None
    return FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(path)), _replicas())


def _replicas() -> torch.distributed.ProcessGroup:
    """The ranks that have the same weights."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def load(path: Path, trainer: Trainer, info: CheckpointInfo, options: CheckpointArguments) -> dict[str, Any]:
    """Load a checkpoint written at any layout into the trainer, in place; of one of adapters alone those.

    With ``--finetune`` only the weights; else also the optimizer, the schedule, the statistics of the focal loss and,
    on the same layout, the random-number state, unless the options leave them out.

    Returns:
        the ``training_state`` that :func:`save` was given; empty with ``--finetune``.

    Raises:
        InputError: the checkpoint does not hold what this model needs.
    """
    model_state = _model_state(trainer, info.has_base)
    state = {"model": model_state}
    # says in one line if the index is damaged; Megatron-Core would go on without it for a while
    absent = _take_out_absent(model_state, TensorReader(path))
    if not (path / "common.pt").is_file():
        raise InputError(f"{path}: common.pt is missing; the checkpoint is damaged")
    whole = not options.finetune and not info.is_converted
    with_optimizer = whole and options.load_optim and info.has_optimizer
    with_rng = whole and options.load_rng and info.has_rng and info.layout == process_groups.layout()
    if with_rng:
        state["rng"] = _rng_object(None)
    try:
        with _quiet():
            if with_optimizer:
                stored = dist_checkpointing.load_common_state_dict(str(path))["optimizer"]
                state["optimizer"] = wanted_state(trainer.optimizer, model_state, stored["steps"])
            loaded = dist_checkpointing.load(state, str(path), sharded_strategy=_load_strategy(path, options))
    except (Exception, CheckpointException) as error:  # torch's is no Exception
        rank = torch.distributed.get_rank()
        raise InputError(f"{path}: rank {rank} cannot load it ({_reason(error)})", always=True) from error
    for name, chunk in _named_chunks(trainer):
        own = chunk.state_dict()
        kept = own.keys() - loaded["model"][name].keys() if not info.has_base else absent[name]
        chunk.load_state_dict({**loaded["model"][name], **{key: own[key] for key in kept}})
    if whole and options.load_optim:
        trainer.scheduler.load_state_dict(loaded["scheduler"])
    if with_optimizer:
        restore(trainer.optimizer, loaded["optimizer"])
        trainer.scheduler.step(increment=0)
    else:
        trainer.optimizer.reload_model_params()
    if with_rng:
        _set_rng_state(loaded["rng"])
    if whole and "statistics" in loaded:
        there = {name: value.to(devices.device()) for name, value in loaded["statistics"].items()}
        trainer.statistics = TaskStatistics(**there)
    return loaded.get("training", {}) if whole else {}


def _named_chunks(trainer: Trainer) -> Iterator[tuple[str, torch.nn.Module]]:
    return ((f"chunk{number}", chunk.module) for number, chunk in enumerate(trainer.chunks))


def _model_state(trainer: Trainer, with_base: bool) -> dict[str, dict]:
    """Weights by chunk, or those of adapters alone; the keys under which they are stored know the layers of the whole
    model, not the chunks."""
    return {
        name: {key: entry for key, entry in chunk.sharded_state_dict().items() if with_base or is_adapter(key)}
        for name, chunk in _named_chunks(trainer)
    }


def _take_out_absent(model_state: dict[str, dict], reader: TensorReader) -> dict[str, list[str]]:
    """Remove from ``model_state``, in place, the extra states that the checkpoint lacks; their names, by chunk.

    A converted model has none: Megatron-Core's own layers have nothing to put there, Transformer Engine's begin anew.
    """
    absent = {
        name: [
            key
            for key, entry in chunk.items()
            if key.endswith("_extra_state")
            and isinstance(entry, ShardedObject)
            and not reader.has_entry(entry.unique_key)
        ]
        for name, chunk in model_state.items()
    }
    for name, keys in absent.items():
        for key in keys:
            del model_state[name][key]
    return absent


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Megatron-Core writes through parts of torch that announce their successors on every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _reason(error: BaseException) -> str:
    """What went wrong, in a line; of torch's collection of every rank's failures the first."""
    if isinstance(error, CheckpointException):
        # the main process alone knows more
        error = next((failure for failure, _ in error.failures.values()), RuntimeError("on another rank"))
    text = str(error).strip() or "no further word"
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"


def _rng_object(state: dict | None) -> ShardedObject:
    """One state per pipeline and tensor-parallel rank and replica, of data and context parallelism."""
    shape = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    )
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return ShardedObject("rng", state, shape, place, replica_id=0)


def _rng_state() -> dict:
    return {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state() if devices.HAS_CUDA else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if devices.HAS_CUDA and state["device"] is not None:
        torch.cuda.set_rng_state(state["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
