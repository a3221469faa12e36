"""Errors of a disk: each is one line with its cause and the right exit code, also where another error hides it."""

import errno
import os
import shutil
import subprocess
import sys

import pytest

from mft_megatron.disk_errors import disk_error, explain, free_space
from mft_megatron.errors import InputError, disk_reported, run_command
from tests.full_disk import largest_file
from tests.ranks import ROOT

CAUSES = {
    errno.ENOSPC: "the disk is full (",
    errno.EDQUOT: "the disk quota is used up (",
    errno.EFBIG: "File too large for the file system or for ulimit -f (",
    errno.EIO: "Input/output error: the device or the connection to it fails",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ESTALE: "the network file system has lost the file",
    errno.ENODEV: "the device is gone",
    errno.ETIMEDOUT: "the network file system does not answer",
}


def failing(number, *file):
    def fail():
        raise OSError(number, os.strerror(number), *file)

    return fail


# numbers that an error of a socket or of a device has, too
AMBIGUOUS = (errno.EACCES, errno.EPERM, errno.ENODEV, errno.ETIMEDOUT)


@pytest.mark.parametrize("file", [(), ("runs/x",), (b"runs/x",)])
@pytest.mark.parametrize("number", CAUSES, ids=errno.errorcode.get)
def test_a_command_says_the_cause_in_one_line(capsys, number, file):
    if not file and number in AMBIGUOUS:
        with pytest.raises(OSError, match=os.strerror(number)):
            run_command(failing(number))
        return
    assert run_command(failing(number, *file)) == 2
    line, where = capsys.readouterr().err, "runs/x" if file else "the output, or a file without a name"
    assert line.startswith(f"error: {where}: {CAUSES[number]}")
    assert line.endswith("; nothing was completed there\n")
    assert line.count("\n") == 1


def test_other_errors_of_the_system_are_as_before(capsys):
    assert run_command(failing(errno.ENOENT, "there")) == 2
    assert capsys.readouterr().err == "error: there: No such file or directory; nothing was completed there\n"
    for number in (errno.ECONNRESET, errno.ENOTCONN, errno.EHOSTDOWN, errno.EREMOTEIO, errno.ENXIO):
        with pytest.raises(OSError, match=os.strerror(number)):
            run_command(failing(number))


@pytest.mark.parametrize("number", CAUSES, ids=errno.errorcode.get)
def test_a_block_says_what_becomes_of_it_and_what_to_do(tmp_path, number):
    inside, above = str(tmp_path / "x" / "y"), str(tmp_path.parent)
    for file, named in (((), tmp_path), ((inside,), inside), ((os.path.relpath(inside),), ""), ((above,), above)):
        with (
            pytest.raises(InputError) as caught,
            disk_reported(tmp_path, "nothing was trained", "choose another --save", True),
        ):
            failing(number, *file)()
        line = str(caught.value)
        assert line.startswith(f"{named or file[0]}: {CAUSES[number]}")
        full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "Free some space, or choose another --save" if full else "Choose another --save"
        assert line.endswith(f"; nothing was trained. {remedy}")
        assert caught.value.always


@pytest.mark.parametrize("number", CAUSES, ids=errno.errorcode.get)
def test_a_file_that_is_read_from_elsewhere_gets_no_remedy_for_the_place(tmp_path, number):
    target = tmp_path / "run"
    with pytest.raises(InputError) as caught, disk_reported(target, "nothing was trained", "choose another --save"):
        failing(number, f"{target}-base/tokenizer.json")()
    line = str(caught.value)
    assert line.startswith(f"{target}-base/tokenizer.json: {CAUSES[number]}")
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    assert line.endswith("; nothing was trained" + (". Free some space" if full else ""))


def test_of_a_copy_the_file_is_named_that_the_disk_cannot_take(tmp_path):
    """shutil names both files of a copy."""
    copy = str(tmp_path / "copy")
    for number, named in ((errno.ENOSPC, copy), (errno.EIO, "source")):
        with pytest.raises(InputError, match=f"^{named}: "), disk_reported(tmp_path, "x", "choose another y"):
            failing(number, "source", None, copy)()


def test_a_missing_file_is_not_the_disks_fault(tmp_path):
    with pytest.raises(FileNotFoundError), disk_reported(tmp_path, "", ""):
        failing(errno.ENOENT, "there")()


def test_free_space_of_a_place_that_does_not_exist_yet(tmp_path):
    assert free_space(tmp_path / "not" / "there") == free_space(tmp_path)
    assert " MB free" in explain(OSError(errno.ENOSPC, ""), tmp_path / "not")
    assert explain(OSError("broken off"), tmp_path) == "broken off"


def hidden(how, number=errno.ENOSPC):
    """An error that hides one of a disk, as libraries raise it."""
    error = RuntimeError("unexpected pos 64 vs 0")
    setattr(error, how, OSError(number, os.strerror(number)))
    return error


def test_a_hidden_cause_is_found():
    asked = ValueError("no")
    asked.__context__ = PermissionError(errno.EACCES, "Permission denied")
    for error in (
        hidden("__cause__"),
        hidden("__context__"),
        RuntimeError("Worker failure: [Errno 28] No space left on device"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):
        assert disk_error(error).errno == errno.ENOSPC
    for number in (errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE):
        for error in (hidden("__context__", number), RuntimeError(f"not written: [Errno {number}] …")):
            assert disk_error(error).errno == number
    for error in (ValueError("no"), FileNotFoundError(errno.ENOENT, "no"), RuntimeError("gone (os error 2)"), asked):
        assert disk_error(error) is None


def test_several_files_that_cannot_be_copied_are_one_line(tmp_path, capsys):
    """shutil collects their errors in one without a number."""
    folder = tmp_path / "from"
    folder.mkdir()
    for name in "ab":
        (folder / name).write_bytes(bytes(100))

    def copy():
        with largest_file(50):
            shutil.copytree(folder, tmp_path / "to")

    assert run_command(copy) == 2
    line = capsys.readouterr().err
    assert "File too large for the file system or for ulimit -f (" in line
    assert line.count("\n") == 1
    shutil.rmtree(tmp_path / "to")
    with pytest.raises(InputError, match=f"^{tmp_path}: File too large"), disk_reported(tmp_path, "x", "y"):
        copy()


@pytest.mark.parametrize("text", ["'short'", "'longer than any buffer' * 9999"])
def test_output_that_cannot_be_written_is_one_line(text):
    code = f"import sys\nfrom mft_megatron.errors import run_command\nsys.exit(run_command(lambda: print({text})))"
    with open("/dev/full", "w") as full:
        process = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.returncode == 2
    assert process.stderr.startswith("error: the output")
    assert ": the disk is full (" in process.stderr
    assert process.stderr.count("\n") == 1
