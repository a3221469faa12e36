"""A folder that is there as a whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mft_megatron.errors import InputError


def refuse_content(target: Path, option: str) -> None:
    """Check, before there is work to lose, that a folder can be made or is empty.

    Raises:
        InputError: it has content; ``option`` named it.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{option} {target}: exists already; remove it or name another folder")


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target`` that becomes it when the work is done, and vanishes when it is not."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.exists():
            target.rmdir()
        os.replace(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:
            # a full disk is met while writing into an open file, which has no name then
            raise InputError(f"{target}: {error.strerror}; nothing was completed there") from None
        raise
