"""Resume a run from a checkpoint."""

import contextlib
import dataclasses
from pathlib import Path
from typing import cast

from mft_megatron.arguments.table import Arguments
from mft_megatron.errors import InputError
from mft_megatron.exit_codes import FAILED
from mft_megatron.mcore.checkpointing import checkpoint
from mft_megatron.mcore.checkpointing.load_weights import fill_weights
from mft_megatron.mcore.checkpointing.weight_source import CheckpointSource
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.trainer import Trainer
from mft_megatron.run_folder.found import described_checkpoints
from mft_megatron.run_folder.names import TRACKER
from mft_megatron.run_folder.replace_text import replace_text
from mft_megatron.run_folder.retention import restore_best
from mft_megatron.training.events import event_record
from mft_megatron.training.progress import Progress
from mft_megatron.training.restarts.differences import batch_explanation, differences
from mft_megatron.training.run_log import RunLog

from .run_state import RunState
from .sources import NO_SOURCES, Sources


def resume(
    arguments: Arguments, trainer: Trainer, log: RunLog, sources: Sources = NO_SOURCES
) -> tuple[Progress, RunState]:
    """Load the checkpoint of ``--load``, if there is one, and weights that it does not have from ``sources``.

    A run that resumes in its own folder gets back the best checkpoint of the step that it resumes from, since it will
    replace all that came later.

    Returns:
        the progress and the state of the run at that checkpoint.

    Raises:
        ValueError: a folder that the run reads is not in ``sources``.
    """
    state: RunState = {}
    if arguments.resume is None:
        if arguments.checkpoint.auto_resume or arguments.checkpoint.load is not None:
            log.print(f"{arguments.checkpoint.save}: no complete checkpoint is there, so the run starts at step 0")
        return Progress(), state
    sources.check(arguments)
    path, info = arguments.resume.path, arguments.resume.info
    options = dataclasses.replace(arguments.checkpoint, finetune=arguments.weights_alone)
    if sources.model is not None:
        with contextlib.closing(sources.model):
            fill_weights(trainer, sources.model)
    elif arguments.base is not None:
        fill_weights(trainer, CheckpointSource(arguments.base.path, arguments.base.info))
    if arguments.base != arguments.resume:
        # a checkpoint has the state that Saver.save was given, as JSON-like values
        state = cast(RunState, checkpoint.load(path, trainer, info, options))
    if sources.adapter is not None and arguments.starts_from_adapter:
        fill_weights(trainer, sources.adapter, adapters=True)
    progress = Progress()
    if not options.finetune:
        progress = Progress(info.iteration, info.consumed_samples, info.skipped_steps)
    also: dict[str, object] = {"adapter": arguments.lora.hf_adapter} if arguments.starts_from_adapter else {}
    if arguments.resume.instead_of:
        also["instead_of"] = list(arguments.resume.instead_of)
    if arguments.base is not None and arguments.base != arguments.resume:
        also["base"] = str(arguments.base.path)
    differs = [] if options.finetune else differences(arguments, info)
    if differs:
        also["differs"] = differs
    log.write(event_record(progress, "load", path=str(path), finetune=options.finetune, **also))
    if not options.finetune and (explanation := batch_explanation(arguments, info)):
        log.print(explanation)
    best = state["stopping"]["run"]["step"] if "stopping" in state else None
    if options.save is not None and path.resolve().parent == Path(options.save).resolve():
        folder = Path(options.save)
        process_groups.write_on_main(folder, lambda: restore_best(folder, best), "nothing was trained")
        if process_groups.is_main() and not options.finetune:
            _name_later(folder, info.iteration, log)
    elif best is not None:
        log.print(f"the best evaluation so far was at step {best}; a checkpoint of it is in {path.parent} alone")
    return progress, state


def agree_on_start(arguments: Arguments) -> None:
    """Check that all ranks start from the same checkpoint; a collective.

    Each looks for it by itself, and a job that is about to end may complete one meanwhile.

    Raises:
        InputError: they do not.
    """
    resume = arguments.resume
    chosen = process_groups.of_all_ranks("no checkpoint" if resume is None else resume.path.name)
    if len(set(chosen)) > 1:
        other = next(rank for rank, name in enumerate(chosen) if name != chosen[0])
        raise InputError(
            f"rank 0 starts from {chosen[0]}, rank {other} from {chosen[other]}: a checkpoint was completed or removed "
            "while the ranks started, or they do not see the same files; start again",
            code=FAILED,
        )


def restore_tracker(folder: Path, arguments: Arguments, log: RunLog) -> None:
    """Write the file that names the newest checkpoint again, for a run that resumes in a folder that lacks it."""
    if arguments.resume is not None and arguments.in_own_folder and not (folder / TRACKER).exists():
        path = arguments.resume.path
        log.print(f"{folder}: {TRACKER}, which names the newest checkpoint, is missing; it is {path.name} from now on")
        replace_text(folder / TRACKER, f"{arguments.resume.info.iteration}\n")


def _name_later(folder: Path, iteration: int, log: RunLog) -> None:
    """Print a line about checkpoints of a run folder after the one that the run goes on from, if there are any."""
    later: list[str] = []
    with contextlib.suppress(OSError):
        later = sorted(found.path.name for found in described_checkpoints(folder) if found.info.iteration > iteration)
    if later:
        log.print(
            f"{folder}: the run goes on from step {iteration}; later checkpoints are there, which are left alone until "
            f"it comes to their steps: {', '.join(later)}"
        )
