"""Files of which Git LFS has left a pointer instead of the content, as in a clone that was made without it."""

from pathlib import Path

from mft_megatron.errors import InputError

_BEGINNING = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(file: Path) -> None:
    """Check that a file is no pointer of Git LFS.

    Raises:
        InputError: it is one.
        OSError: it cannot be read.
    """
    with open(file, "rb") as opened:
        if opened.read(len(_BEGINNING)) == _BEGINNING:
            raise InputError(
                f"{file}: is a pointer of Git LFS, not the file itself; in its folder run 'git lfs install' and "
                "'git lfs pull', or download the file again"
            )
