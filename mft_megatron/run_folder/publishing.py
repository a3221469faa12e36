"""A checkpoint becomes visible at once: it is written under another name, made durable, and renamed.

::

    .saving.iter_0000010.TOKEN      being written; of a dead job, if no job writes
    iter_0000010                    complete: renamed when all of it is on the disk
    .replaced.iter_0000010.TOKEN    the one that was there before, until the new one is durable
    .removing.iter_0000010.TOKEN    no longer a checkpoint; its files are being removed

Nothing whole is ever removed or overwritten before what takes its place is durable, so a job that is killed between any
two system calls, or a machine that loses power, leaves whole checkpoints under the names that the tracker has.
"""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
from pathlib import Path

from .names import BEST, CONFIG, TRACKER, iteration_folder

_LEFTOVER = re.compile(r"\.(saving|replaced|removing)\.(iter_\d+)\.[0-9a-f]+")
# of the main rank alone, so its owner knows that nobody is writing them
_SMALL_LEFTOVER = re.compile(rf"\.({'|'.join(map(re.escape, (TRACKER, BEST, CONFIG)))})\.\d+\.tmp")
# renameat2's flag
_EXCHANGE = 2
_AT_FDCWD = -100
# file systems that cannot exchange two folders, or kernels without the call
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.ENOTSUP, errno.EPERM)
# file systems on which a folder cannot be synchronised: those keep names by themselves
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def new_token() -> str:
    """A word that tells the unfinished checkpoints of one job from those of a dead one whose processes still write."""
    return secrets.token_hex(4)


def unfinished_folder(folder: Path, iteration: int, token: str) -> Path:
    """The folder in which a checkpoint of a run folder is written until it is complete."""
    return folder / f".saving.{iteration_folder(folder, iteration).name}.{token}"


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk.

    Raises:
        OSError: it is not there, or the disk fails.
    """
    _sync(path, ())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk; nothing on file systems that cannot be asked.

    Raises:
        OSError: it is not there, or the disk fails.
    """
    _sync(path, _NO_SYNC)


def sync_tree(path: Path) -> None:
    """Wait until all that a folder and those in it hold is on the disk.

    Raises:
        OSError: the disk fails.
    """
    for folder, _, names in os.walk(path):
        for name in names:
            sync_file(Path(folder) / name)
        sync_folder(Path(folder))


def publish(unfinished: Path, path: Path) -> None:
    """Give a whole, durable checkpoint its name, and remove the one that had it.

    Args:
        unfinished: its folder until now, beside ``path``.
        path: its name from now on; a checkpoint may be there.

    Raises:
        OSError: the disk fails; ``path`` is what it was, or the new one.
    """
    sync_folder(unfinished)
    old = path.with_name(f".replaced.{path.name}.{unfinished.name.rpartition('.')[2]}")
    replaces = path.is_dir()
    if not replaces:
        os.rename(unfinished, path)
    elif _exchange(unfinished, path):
        os.rename(unfinished, old)
    else:
        os.rename(path, old)
        try:
            os.rename(unfinished, path)
        except OSError:
            os.rename(old, path)
            raise
    sync_folder(path.parent)
    if replaces:
        _remove(old)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint that is to be removed, so that it is none from now on; returns its folder.

    Raises:
        OSError: it cannot be renamed, and is still whole.
    """
    aside = path.with_name(f".removing.{path.name}.{new_token()}")
    os.rename(path, aside)
    sync_folder(path.parent)
    return aside


def restore_replaced(path: Path) -> bool:
    """Give a checkpoint its name back, if a job was killed between the two renames of its replacement.

    Args:
        path: a checkpoint that is not there.

    Returns:
        whether it is there now.
    """
    for old in sorted(path.parent.glob(f".replaced.{path.name}.*")):
        if path.is_dir() or not _LEFTOVER.fullmatch(old.name):
            break
        with contextlib.suppress(OSError):  # another process was first, or the file system is read-only
            os.rename(old, path)
            sync_folder(path.parent)
    return path.is_dir()


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what dead jobs have left unfinished in a run folder, on behalf of its owner; returns what is gone.

    What was replaced gets its name back if nothing else has it. What cannot be removed stays until the next time.
    """
    removed = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = _LEFTOVER.fullmatch(path.name)
        if found and path.is_dir() and not path.is_symlink():
            final = folder / found[2]
            if found[1] == "replaced" and not final.exists() and restore_replaced(final):
                continue
            try:
                sync_folder(folder)  # what took its place may not be durable yet
            except OSError:
                continue
            shutil.rmtree(path, ignore_errors=True)
        elif _SMALL_LEFTOVER.fullmatch(path.name) and path.is_file():
            with contextlib.suppress(OSError):
                path.unlink()
        else:
            continue
        if not path.exists():
            removed.append(path)
    return removed


def _remove(path: Path) -> None:
    """Remove a folder, or the link to one that was put elsewhere; what stays of a folder is a leftover, tried again."""
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path, ignored: tuple[int, ...]) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in ignored:
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(number)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; returns whether the file system can.

    Raises:
        OSError: the disk fails.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):  # glibc before 2.28
        return False
    if library.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))
