"""Memory maps of a data set's files: one that cannot be read any more is named, where SIGBUS would end the process.

A map of a file that another process cuts off, or that is on a device that fails, has pages without content; reading
one is a SIGBUS. Within :func:`readable` it is an error of one line; elsewhere the process prints that line and exits
with 2 (:mod:`mft_megatron.data._mapped_files`).
"""

import contextlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mft_megatron.data import _mapped_files
from mft_megatron.errors import InputError


def watched(array: np.ndarray, path: str | Path) -> np.ndarray:
    """Name a file when its map cannot be read; returns the map.

    Args:
        array: a memory map of any dtype and shape; an array in memory is left alone.
        path: of the file.
    """
    mapping = getattr(array, "_mmap", None)
    if mapping is not None and array.nbytes:
        path = os.path.abspath(path)
        number = _mapped_files.watch(array.ctypes.data, array.nbytes, os.stat(path).st_size, path)
        # views keep the map and not the array
        weakref.finalize(mapping, _mapped_files.release, number).atexit = False
    return array


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Raise an error for a file that cannot be read inside the block, whose pages are zeros until then.

    Raises:
        InputError: a file was cut off, or its device fails; for this process alone, since others may read it. Whatever
            else the block raises comes from the zeros.
    """
    _mapped_files.enter_guard()
    try:
        yield
    finally:
        path = _mapped_files.leave_guard()
        if path:
            raise InputError(f"{path}: {_why(Path(path))}; restore it, or preprocess the data again", always=True)


def _why(path: Path) -> str:
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"cannot be read any more ({error.strerror})"
    return f"was cut off or replaced while it was read, and has {size} bytes now"
