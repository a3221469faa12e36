"""Failures of a save: every rank learns of each in the same place, in one line, and nothing half-written stays."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from mft_megatron.disk_errors import disk_error, explain
from mft_megatron.errors import InputError
from mft_megatron.exit_codes import STORAGE
from mft_megatron.mcore.checkpointing.common_state import if_it_fails
from mft_megatron.mcore.checkpointing.failures import reason
from mft_megatron.mcore.parallel import process_groups


class SaveError(InputError):
    """A checkpoint could not be written, on any rank: nothing of it is left, and the run folder is as it was.

    Attributes:
        path: the folder that it would have had.
    """

    def __init__(self, message: str, path: Path):
        super().__init__(message, code=STORAGE)
        self.path = path


def failure_of(write: Callable[[], object]) -> OSError | InputError | None:
    """Write; return the error of the disk, or of what was asked first, if there was one."""
    try:
        write()
    except (OSError, InputError) as error:
        return error
    return None


def on_main(path: Path, write: Callable[[], object], how: str = "", consequence: str | None = None) -> None:
    """Write on the main rank alone, while the others wait; a collective of all ranks.

    Args:
        path: a checkpoint, or what else is written.
        write: writes it.
        how: words that follow "cannot be written".
        consequence: what becomes of the run; by default, which checkpoint is the newest.

    Raises:
        SaveError: it cannot be written; on every rank.
        InputError: as ``write``; on every rank.
    """
    agree(path, failure_of(write) if process_groups.is_main() else None, how, consequence)


def agree(path: Path, failure: Exception | None, how: str, consequence: str | None = None) -> None:
    """Raise on every rank the first failure that a rank had in writing ``path``; a collective.

    Args:
        path: as in :func:`on_main`.
        failure: this rank's.
        how: as in :func:`on_main`.
        consequence: as in :func:`on_main`.

    Raises:
        SaveError: there is one.
        InputError: it is one that another place has put into words.
    """
    message = None
    if isinstance(failure, InputError):
        message = str(failure), failure.code
    elif failure is not None:
        disk = disk_error(failure)
        why = reason(failure) if disk is None else explain(disk, path)
        message = f"{path}: cannot be written{how} ({why}); {consequence or if_it_fails(path)}", STORAGE
    if (first := process_groups.first_of_any_rank(message)) is not None:
        text, code = first
        raise SaveError(text, path) if code == STORAGE else InputError(text, code=code)


@contextlib.contextmanager
def removed_after_error(unfinished: Path) -> Iterator[None]:
    """Leave nothing of a checkpoint that cannot be completed, so that it does not fill the disk."""
    try:
        yield
    except BaseException:
        if process_groups.is_main():
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
