"""Small text files that are written atomically."""

import contextlib
import os
from pathlib import Path

from .publishing import sync_folder


def replace_text(path: Path, text: str) -> None:
    """Write a small text file atomically: a reader sees the old content or the new, never a part.

    It is on the disk when this returns.

    Raises:
        OSError: it cannot be written; the error names it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
