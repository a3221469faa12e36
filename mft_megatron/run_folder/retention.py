"""Checkpoints of a run that are kept: the best is recorded, and those that need not be kept are removed."""

import contextlib
import shutil
from pathlib import Path

from mft_megatron.errors import InputError

from .description import CheckpointRef, read_info
from .found import best_checkpoint, described_checkpoints, latest_checkpoint
from .manifest import DamagedCheckpointError
from .names import BEST, iteration_folder
from .publishing import set_aside
from .replace_text import replace_text


def record_best(folder: Path, iteration: int) -> None:
    """Record the complete checkpoint of ``iteration`` as the best of the run in ``folder``."""
    replace_text(folder / BEST, f"{iteration}\n")


def restore_best(folder: Path, iteration: int | None) -> None:
    """Record the checkpoint of ``iteration`` as the best again, for a run that resumes from an earlier iteration.

    If it does not exist, is damaged or was not saved as the best, the run has no best checkpoint.
    """
    if iteration is not None:
        path = iteration_folder(folder, iteration)
        with contextlib.suppress(InputError):
            if path.is_dir() and read_info(path).best:
                record_best(folder, iteration)
                return
    (folder / BEST).unlink(missing_ok=True)


def superseded(folder: Path) -> list[Path]:
    """Checkpoints that were saved only as the best and are no longer the best nor the newest, oldest first.

    All such checkpoints in ``folder``, including those that an interrupted job did not remove.
    """
    return [found.path for found in _unnamed(folder) if not found.info.asked_for]


def not_kept(folder: Path, last: int | None, interval: int | None) -> list[Path]:
    """Checkpoints that neither of two options keeps, and that are neither the newest nor the best, oldest first.

    Those after the newest, of a run that was resumed from an earlier one, are left alone until it comes to them.

    Args:
        folder: the run folder.
        last: number of the newest checkpoints that are kept.
        interval: checkpoints whose iteration is divisible by this are kept.
    """
    if last is None and interval is None:
        return []
    newest = latest_checkpoint(folder).info.iteration
    earlier = sorted(found.info.iteration for found in _complete(folder) if found.info.iteration <= newest)
    kept = [] if last is None else earlier[-last:]
    kept += [] if interval is None else [iteration for iteration in earlier if iteration % interval == 0]
    return [found.path for found in _unnamed(folder) if found.info.iteration in set(earlier).difference(kept)]


def _unnamed(folder: Path) -> list[CheckpointRef]:
    """Complete checkpoints of the run in ``folder`` except the newest and the best, oldest first."""
    named = [latest_checkpoint(folder).path]
    if (folder / BEST).is_file():
        with contextlib.suppress(DamagedCheckpointError):  # none that is complete
            named.append(best_checkpoint(folder).path)
    return [found for found in _complete(folder) if found.path not in named]


def _complete(folder: Path) -> list[CheckpointRef]:
    """Complete checkpoints of the run in ``folder``, oldest first; no links, whose content may not be its own."""
    return [found for found in described_checkpoints(folder) if not found.path.is_symlink()]


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, which is none from the first moment; an interruption leaves a leftover under another name.

    Raises:
        OSError: it cannot be removed.
    """
    shutil.rmtree(set_aside(path))
