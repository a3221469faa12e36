"""Going back to a checkpoint of the run in the same process, as a resume from it would begin."""

import dataclasses
from pathlib import Path
from typing import cast

from mft_megatron import progress_marks
from mft_megatron.arguments.table import Arguments
from mft_megatron.mcore.checkpointing import checkpoint
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.trainer import Trainer
from mft_megatron.run_folder.names import TRACKER
from mft_megatron.run_folder.replace_text import replace_text
from mft_megatron.run_folder.retention import restore_best
from mft_megatron.training.events import event_record
from mft_megatron.training.progress import Progress
from mft_megatron.training.run_log import RunLog
from mft_megatron.training.saving.run_state import RunState

from .bad_steps import RollbackRequest


def go_back(arguments: Arguments, trainer: Trainer, log: RunLog, request: RollbackRequest) -> tuple[Progress, RunState]:
    """Load the checkpoint of a request into the trainer; a collective.

    It is the newest of the run folder from now on, and the best one of its time is the best again.

    Returns:
        the progress and the state of the run at that checkpoint.

    Raises:
        InputError: it cannot be loaded, or the run folder cannot be written; on every rank.
    """
    path, info = request.target.path, request.target.info
    options = dataclasses.replace(arguments.checkpoint, finetune=False, load_optim=True, load_rng=True)
    progress_marks.mark("load")
    trainer.forget_progress()
    state = cast(RunState, checkpoint.load(path, trainer, info, options))
    progress = Progress(info.iteration, info.consumed_samples, info.skipped_steps)
    best = state["stopping"]["run"]["step"] if "stopping" in state else None
    folder = Path(arguments.checkpoint.save or path.parent)

    def name_newest() -> None:
        replace_text(folder / TRACKER, f"{info.iteration}\n")
        restore_best(folder, best)

    if path.parent == folder:
        process_groups.write_on_main(folder, name_newest, "the run does not go back")
    log.write(event_record(progress, "rollback", path=str(path), from_step=request.step))
    return progress, state
