"""A folder that exists completely or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mft_megatron.disk_errors import disk_error, failure
from mft_megatron.errors import InputError
from mft_megatron.run_folder.publishing import sync_folder, sync_tree


def refuse_content(target: Path, option: str) -> None:
    """Check, before there is work to lose, that a folder can be created or is empty.

    Args:
        option: command-line option that named ``target``.

    Raises:
        InputError: the folder has content, or is a file.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{option} {target}: exists already; remove it or name another folder")


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Create a hidden folder beside ``target``; rename it to ``target`` on success, remove it on any error.

    What it holds is on the disk when it has its name: a checkpoint may be removed once it is exported.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_tree(partial)
        if target.exists():
            target.rmdir()
        os.replace(partial, target)
        sync_folder(target.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        disk = disk_error(error) if isinstance(error, Exception) and not isinstance(error, InputError) else None
        if disk is None and isinstance(error, OSError) and error.filename is None:
            disk = error
        if disk is not None:
            # an error while writing to an open file, such as a full disk, names no file
            raise InputError(failure(disk, target, "nothing was completed there")) from None
        raise
