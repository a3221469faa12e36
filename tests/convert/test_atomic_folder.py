"""A folder that exists completely or not at all, whatever ends its writing, and the line that says why."""

import errno
import os

import pytest

from mft_megatron.convert.atomic_folder import replacing
from mft_megatron.errors import InputError


def after(error, cause):
    error.__context__ = cause
    return error


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
SAID = {
    "a full disk": (FULL, "TARGET: the disk is full ("),
    "a quota, with a file": (OSError(errno.EDQUOT, "", "TARGET/x"), "TARGET/x: the disk quota is used up ("),
    "a read-only disk": (OSError(errno.EROFS, "", "TARGET/x"), "TARGET/x: the file system is read-only; nothing"),
    "a broken device": (OSError(errno.EIO, ""), "TARGET: Input/output error: the device or the connection to it"),
    "another error": (OSError(errno.EMFILE, "Too many open files"), "TARGET: Too many open files; nothing"),
    "torch's error over it": (after(RuntimeError("unexpected pos 64"), FULL), "TARGET: the disk is full ("),
    "safetensors' error": (
        RuntimeError("I/O error: No space left on device (os error 28)"),
        "TARGET: the disk is full",
    ),
}


def write(target, error):
    with replacing(target) as partial:
        (partial / "half").write_text("")
        raise error


@pytest.mark.parametrize("case", SAID)
def test_a_disk_that_takes_no_more_leaves_nothing(tmp_path, case):
    error, said = SAID[case]
    target = tmp_path / "folder"
    if isinstance(error, OSError) and error.filename is not None:
        error = OSError(error.errno, error.strerror, f"{target}/x")
    with pytest.raises(InputError) as caught:
        write(target, error)
    assert str(caught.value).startswith(said.replace("TARGET", str(target)))
    assert str(caught.value).endswith("; nothing was completed there")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        ValueError("x"),
        FileNotFoundError(errno.ENOENT, "", "x"),
        after(InputError("its own line"), FULL),
        after(KeyboardInterrupt(), FULL),
    ],
    ids=repr,
)
def test_other_errors_are_as_they_were(tmp_path, error):
    with pytest.raises(type(error)) as caught:
        write(tmp_path / "folder", error)
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []
