"""Megatron-Core distributed checkpoints: write one, load one into any parallel layout.

A save is complete when its folder, and then the tracker file, have been renamed to their final names; a save that was
interrupted before is never loaded. Random-number states belong to a parallel layout and are restored only into the same
one.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import contextlib
import dataclasses
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.models.gpt.gpt_model import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from mft_megatron import progress_marks
from mft_megatron.arguments.groups.checkpointing import CheckpointArguments
from mft_megatron.common_state import COMMON
from mft_megatron.errors import InputError
from mft_megatron.exit_codes import DAMAGED
from mft_megatron.lora import is_adapter
from mft_megatron.losses.focal import TaskStatistics
from mft_megatron.mcore.optim.checkpointed_state import restore, stored_state, wanted_state
from mft_megatron.mcore.optim.finite_states import find_non_finite
from mft_megatron.mcore.parallel import process_groups, timeouts
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.platform.checkpoint_pickles import refuse_code
from mft_megatron.mcore.platform.releases import accepted
from mft_megatron.mcore.trainer import Trainer
from mft_megatron.run_folder.description import CheckpointInfo, write_info
from mft_megatron.run_folder.manifest import write_manifest
from mft_megatron.run_folder.names import TRACKER, iteration_folder
from mft_megatron.run_folder.publishing import new_token, publish, unfinished_folder
from mft_megatron.run_folder.replace_text import replace_text
from mft_megatron.run_folder.space import refuse_without_room
from mft_megatron.run_folder.verification import DESCRIPTION, copied_description

from .common_state import if_it_fails, require_common, sharded_copy, write_common
from .failures import agreed, reading_failed
from .finite import NotFiniteError
from .random_state import random_state, set_random_state, sharded_random_state
from .save_plans import SavePlans
from .shared_load import SharedLoad
from .tensor_reader import TensorReader
from .writers.agreement import agree, failure_of, on_main, removed_after_error
from .writers.save_in_progress import SaveInProgress

# CPU tensors, numbers, strings, lists and dicts
TrainingState: TypeAlias = dict[str, Any]
# entries of Megatron-Core's sharded state dict by key
ShardedState: TypeAlias = dict[str, Any]
_EXTRA_STATE = "_extra_state"


@dataclasses.dataclass(frozen=True)
class _Unfinished:
    """A checkpoint that is being written in ``folder``, and will be ``path``."""

    path: Path
    folder: Path
    info: CheckpointInfo
    when_complete: Callable[[], None] | None
    part: SaveInProgress


class Writer:
    """Writes one checkpoint at a time; with ``--async-save`` in the background.

    Background processes write a copy of the weights and states. All ranks learn in the same call of :meth:`poll` or
    :meth:`finish` that writing has ended; only then is the checkpoint the newest of the run. Until it is, and if it
    fails, what the run folder had stays as it was (:mod:`mft_megatron.run_folder.publishing`).
    """

    def __init__(
        self, options: CheckpointArguments, with_base: bool = True, refuse_if_lost: Callable[[], None] = lambda: None
    ):
        """Prepare to write.

        Args:
            options: how to write, and whether checkpoints include the optimizer and the random-number state.
            with_base: include all weights; otherwise those of adapters alone.
            refuse_if_lost: called on the main rank before a checkpoint is begun, and before it becomes the newest;
                raises an ``InputError`` where this job must not write into the run folder any more.
        """
        self._refuse_if_lost = refuse_if_lost
        self._options, self._with_base = options, with_base
        self._unfinished: _Unfinished | None = None
        self._plans: SavePlans | None = None
        self._token: str | None = None

    @timeouts.long_waits()
    def save(
        self,
        folder: Path,
        trainer: Trainer,
        info: CheckpointInfo,
        training_state: TrainingState | None = None,
        when_complete: Callable[[], None] | None = None,
    ) -> Path:
        """Write a checkpoint of all ranks and make it the newest of the run; a collective of all ranks.

        Waits until the previous checkpoint is complete.

        Args:
            folder: the run folder, ``--save``.
            trainer: its weights, optimizer, schedule and statistics are saved.
            info: description of the checkpoint; its iteration names the folder.
            training_state: state of the training loop: CPU tensors, numbers, strings, lists and dicts, the same on
                every rank.
            when_complete: called on every rank when the checkpoint is the newest.

        Returns:
            the checkpoint's folder, complete unless it is written in the background.

        Raises:
            SaveError: this checkpoint, or the previous one in the background, could not be written; on every rank.
            NotFiniteError: a weight or a state of the optimizer is not finite, and nothing is written; on every rank.
        """
        self.finish()
        progress_marks.mark("save", checkpoint=info.iteration)
        path = iteration_folder(folder, info.iteration)
        found = find_non_finite(trainer.chunks, trainer.optimizer, self._with_base)
        if found is not None:
            raise NotFiniteError(f"{path}: {found} in it, and is not saved; {if_it_fails(path)}", found)
        unfinished = unfinished_folder(folder, info.iteration, self._job())
        with removed_after_error(unfinished), trainer.weights.whole(), _quiet():
            state = state_to_save(trainer, self._options, training_state, self._with_base)
            state[DESCRIPTION] = copied_description(info)
            plans = self._plans_for(state)

            def begin() -> None:
                self._refuse_if_lost()
                _begin(unfinished, plans.bytes)

            on_main(path, begin)
            sharded, common = save_preprocess(state, plans.is_new)
            strategy = plans.strategy
            # since 0.17 the default is the queue of another package
            way = accepted(strategy.async_save, async_strategy="mcore")
            part = strategy.async_save({**sharded, **sharded_copy(common)}, unfinished, **way)
            part.write(in_background=self._options.async_save)
            if process_groups.is_main() and part.failure is None:
                part.failure = failure_of(lambda: part.hashes.update({COMMON: write_common(common, unfinished)}))
        self._unfinished = _Unfinished(path, unfinished, info, when_complete, part)
        if not self._options.async_save:
            self._complete()
        return path

    def poll(self) -> None:
        """Complete a checkpoint whose writing has ended; a collective of all ranks.

        Raises:
            SaveError: it could not be written.
        """
        if self._unfinished is not None and self._unfinished.part.has_ended():
            self._complete(" in the background")

    def finish(self) -> None:
        """Wait for a checkpoint that is being written and complete it; a collective of all ranks.

        Raises:
            SaveError: it could not be written.
        """
        if self._unfinished is not None:
            self._complete(" in the background")

    def _job(self) -> str:
        """The job's word in the names of unfinished checkpoints, the same on all ranks."""
        if self._token is None:
            chosen = torch.tensor([int(new_token(), 16)])
            self._token = f"{int(process_groups.broadcast_from_main(chosen)):08x}"
        return self._token

    def _plans_for(self, state: dict[str, Any]) -> SavePlans:
        if self._plans is None:
            self._plans = SavePlans(_replicas() if self._options.ckpt_fully_parallel_save else None)
        self._plans.adapt(state)
        return self._plans

    @timeouts.long_waits()
    def _complete(self, how: str = "") -> None:
        """Wait for this rank's files, and make the checkpoint the newest once all ranks have written theirs."""
        assert self._unfinished is not None
        saved, self._unfinished = self._unfinished, None
        progress_marks.mark(f"save{how}", checkpoint=saved.info.iteration)
        saved.part.wait()
        with removed_after_error(saved.folder), _quiet():
            agree(saved.path, saved.part.failure, how)
            written = saved.part.gather()

            def publish_newest() -> None:
                self._refuse_if_lost()
                manifest = write_manifest(saved.folder, saved.part.write_index(written))
                write_info(saved.folder, dataclasses.replace(saved.info, manifest=manifest))
                publish(saved.folder, saved.path)
                replace_text(saved.path.parent / TRACKER, f"{saved.info.iteration}\n")

            on_main(saved.path, publish_newest, how)
        if saved.when_complete is not None:
            saved.when_complete()


def _begin(unfinished: Path, needed: int) -> None:
    """Make the folder that a checkpoint is written into, where there is room for it.

    Raises:
        OSError: there is none, or the folder cannot be made.
    """
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    for left in unfinished.parent.glob(f".saving.*{unfinished.suffix}"):  # of a save that failed, on a failing disk
        shutil.rmtree(left, ignore_errors=True)
    refuse_without_room(unfinished.parent, needed)
    unfinished.mkdir()


def save(
    folder: Path,
    trainer: Trainer,
    info: CheckpointInfo,
    options: CheckpointArguments,
    training_state: TrainingState | None = None,
    with_base: bool = True,
) -> Path:
    """Write a single checkpoint as :meth:`Writer.save` does, and wait until it is complete."""
    writer = Writer(options, with_base)
    path = writer.save(folder, trainer, info, training_state)
    writer.finish()
    return path


def state_to_save(
    trainer: Trainer, options: CheckpointArguments, training_state: TrainingState | None, with_base: bool
) -> dict[str, Any]:
    """Build the sharded state of a checkpoint, as :class:`Writer` writes it; a collective of all ranks."""
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
        state["rng"] = sharded_random_state(random_state())
    return state


def _replicas() -> torch.distributed.ProcessGroup:
    """Ranks that have the same weights."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def load(path: Path, trainer: Trainer, info: CheckpointInfo, options: CheckpointArguments) -> TrainingState:
    """Load a checkpoint written at any parallel layout into the trainer, in place; a collective of all ranks.

    With ``--finetune`` only weights are loaded; otherwise also the position in the schedule, the statistics of the
    focal loss and, unless the options leave them out, the optimizer and, on the same parallel layout, the random-number
    state. From a checkpoint of adapters alone only the adapters' weights are loaded.

    Args:
        path: the checkpoint's folder.
        trainer: what the checkpoint is loaded into.
        info: description of the checkpoint.
        options: what to load.

    Returns:
        the ``training_state`` given to :func:`save`; empty with ``--finetune``.

    Raises:
        InputError: the checkpoint lacks something that this model needs, or is damaged.
    """
    progress_marks.mark("load", checkpoint=str(path))
    model_state = _model_state(trainer, info.has_base)
    state: dict[str, Any] = {"model": model_state}
    # raises a one-line error if the index is damaged, which Megatron-Core would notice late
    reader = agreed(path, lambda: TensorReader(path))
    absent = _remove_absent_states(model_state, reader)
    agreed(path, lambda: require_common(path, reader))
    whole = not options.finetune and not info.is_converted
    with_optimizer = whole and options.load_optim and info.has_optimizer
    with_rng = whole and options.load_rng and info.has_rng and info.layout == process_groups.parallel_layout()
    if with_rng:
        state["rng"] = sharded_random_state(None)
    try:
        with _quiet():
            if with_optimizer:
                stored = agreed(path, lambda: dist_checkpointing.load_common_state_dict(str(path))["optimizer"])
                state["optimizer"] = wanted_state(trainer.optimizer, model_state, stored["steps"])
            loaded = dist_checkpointing.load(state, str(path), sharded_strategy=SharedLoad(path, reader))
    except InputError:
        raise
    except (Exception, CheckpointException) as error:  # torch's is no subclass of Exception
        raise InputError(reading_failed(path, error), always=True) from error
    agreed(path, lambda: refuse_code(_extra_states(loaded["model"])))
    for name, chunk in _named_chunks(trainer):
        current = chunk.state_dict()
        kept = current.keys() - loaded["model"][name].keys() if not info.has_base else absent[name]
        chunk.load_state_dict({**loaded["model"][name], **{key: current[key] for key in kept}})
    if whole:
        trainer.scheduler.load_state_dict(loaded["scheduler"])
    if with_optimizer:
        restore(trainer.optimizer, loaded["optimizer"])
        trainer.scheduler.step(increment=0)
    else:
        trainer.optimizer.reload_model_params()
    found = find_non_finite(trainer.chunks, trainer.optimizer, info.has_base)
    if found is not None:
        raise InputError(
            f"{path}: {found} in it, and every loss would be NaN; take an earlier one with --ckpt-step", code=DAMAGED
        )
    if with_rng:
        set_random_state(loaded["rng"])
    if whole and "statistics" in loaded:
        statistics = {name: value.to(devices.device()) for name, value in loaded["statistics"].items()}
        trainer.statistics = TaskStatistics(**statistics)
    return loaded.get("training", {}) if whole else {}


def _extra_states(model_state: dict[str, dict[str, object]]) -> dict[str, object]:
    return {key: state for chunk in model_state.values() for key, state in chunk.items() if key.endswith(_EXTRA_STATE)}


def _named_chunks(trainer: Trainer) -> Iterator[tuple[str, GPTModel]]:
    return ((f"chunk{number}", chunk.module) for number, chunk in enumerate(trainer.chunks))


def _model_state(trainer: Trainer, with_base: bool) -> dict[str, ShardedState]:
    """Sharded state of each model chunk, of all weights or of adapters alone.

    Weights are stored under keys that count the layers of the whole model, so chunks do not matter in a checkpoint.
    """
    return {
        name: {key: entry for key, entry in chunk.sharded_state_dict().items() if with_base or is_adapter(key)}
        for name, chunk in _named_chunks(trainer)
    }


def _remove_absent_states(model_state: dict[str, ShardedState], reader: TensorReader) -> dict[str, list[str]]:
    """Remove, in place, the extra states of ``model_state`` that the checkpoint lacks, and return their keys by chunk.

    A converted model has no extra states: those of Megatron-Core's layers are empty, and Transformer Engine's start
    from their initial values.
    """
    absent = {
        name: [
            key
            for key, entry in chunk.items()
            if key.endswith(_EXTRA_STATE)
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
    """Ignore warnings of torch about how Megatron-Core's checkpoints use it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # since 0.19 each rank loads by itself
        warnings.filterwarnings("ignore", message="The argument order of load has been changed")
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
