"""Errors of the operating system about files, in words for a user."""

import errno
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

# a disk or a share of it that can take no more
FULL: Mapping[int, str] = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "File too large for the file system or for ulimit -f",
}
# everything else that is about the place and not about one file
UNUSABLE: Mapping[int, str] = {
    errno.EIO: "Input/output error: the device or the connection to it fails",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ESTALE: "the network file system has lost the file",
    errno.ENXIO: "the device is gone",
    errno.ENODEV: "the device is gone",
    errno.ENOTCONN: "the network file system is not connected",
    errno.ETIMEDOUT: "the network file system does not answer",
    errno.EHOSTDOWN: "the network file system does not answer",
    errno.EREMOTEIO: "Input/output error of the network file system",
}

# errors of files alone, also where they name none or are behind another one; sockets and devices have the others, too
OF_FILES = (*FULL, errno.EIO, errno.EROFS, errno.ESTALE)


class NoRoomError(OSError):
    """Too little space, found before anything is written; ``strerror`` says how much is missing."""


def is_of_disk(error: OSError) -> bool:
    """Whether the error is about a place that cannot be written or read, and not about one file that is missing."""
    return error.errno in FULL or error.errno in UNUSABLE


def explain(error: OSError, place: Path | str) -> str:
    """The meaning of an error in words, with the free space where that is the cause.

    Args:
        error: of the operating system.
        place: file or folder that was written or read; it need not exist.
    """
    number = error.errno or 0
    if isinstance(error, NoRoomError):
        return f"{FULL[number]}: {error.strerror}"
    if number in FULL:
        return f"{FULL[number]} ({free_space(place)})"
    if number in UNUSABLE:
        return UNUSABLE[number]
    return error.strerror or str(error) or type(error).__name__


def named_file(error: OSError) -> str | None:
    """The file that an error names: of a copy's two files the written one where the disk can take no more."""
    name = error.filename if error.filename2 is None or error.errno not in FULL else error.filename2
    return os.fsdecode(name) if isinstance(name, (str, bytes)) else None


def failure(error: OSError, place: Path | str, consequence: str) -> str:
    """Words about an error, in a line: the file, the cause and the consequence.

    Args:
        error: of the operating system.
        place: what is written or read, for errors that name no file.
        consequence: what became of it.
    """
    where = named_file(error) or place
    return f"{where}: {explain(error, where)}; {consequence}"


def disk_error(error: BaseException) -> OSError | None:
    """The error of a disk that an error is or hides; ``None`` if it is of another kind.

    Libraries hide it as their error's cause or context, or in its text: ``[Errno 28]``, as in an error of several files
    that :mod:`shutil` copies, or ``(os error 28)``, as Rust's do. A permission is not hidden: who asked for one that is
    missing may have gone on.
    """
    if isinstance(error, OSError) and is_of_disk(error):
        return error
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in OF_FILES:
            return seen
        found = re.search(r"(?:\[Errno|\(os error) (\d+)", str(seen))
        if found and int(found[1]) in OF_FILES:
            return OSError(int(found[1]), os.strerror(int(found[1])))
        seen = seen.__cause__ or seen.__context__
    return None


def free_space(place: Path | str) -> str:
    """The free space of the file system that holds ``place``, which need not exist."""
    folder = Path(os.path.abspath(place))
    try:
        while not folder.exists():
            folder = folder.parent
        return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB free now"
    except OSError:
        return "free space unknown"
