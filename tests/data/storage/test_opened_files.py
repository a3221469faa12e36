"""Files of a data set that are changed under a run: named, whatever the change; one that is only touched is not."""

import os
import time

import numpy as np
import pytest

from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.storage import opened_files
from mft_megatron.errors import run_command
from tests.made_dataset import write_dataset
from tests.refusals import refused_call

WHEN = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(10**9))


@pytest.fixture
def file(tmp_path):
    """The ids of a data set."""
    write_dataset(tmp_path / "set", 128, longest=120)
    file = tmp_path / "set_input_ids.bin"
    os.utime(file, ns=(0, 10**18))
    return file


@pytest.fixture
def opened(file):
    """The files of the data set, opened by a process that has hashed them."""
    return PackedDataset.open(file.parent / "set", 128, "hashes").files


def overwrite(file, position, content=b"\xff"):
    with open(file, "r+b") as stream:
        stream.seek(position)
        stream.write(content)


def replaced(file, content):
    other = file.with_name("other")
    other.write_bytes(content)
    os.replace(other, file)


# what is done, and what is said of it; by every process, or by those that compare more than sizes
CHANGES = {
    "cut off": (lambda file: os.truncate(file, 10), "it had {before}, and has 10 bytes of ", True),
    "extended": (lambda file: overwrite(file, file.stat().st_size), "it had {before}, and has ", True),
    "deleted": (os.unlink, "it cannot be found any more (No such file or directory)", True),
    "overwritten": (lambda file: overwrite(file, 1001), "it had {before}, and has ", False),
    "replaced": (lambda file: replaced(file, bytes(file.stat().st_size)), "it had {before}, and has ", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_named(file, opened, change):
    size, (make, said, by_all) = file.stat().st_size, CHANGES[change]
    opened.refuse_change()
    make(file)
    expected = f"{file}: was changed while it is used: {said.format(before=f'{size} bytes of {WHEN}')}"
    assert refused_call(opened.refuse_change).startswith(expected)
    opened._next = 0
    with pytest.raises(opened_files.InputError) as caught:
        opened.poll()
    assert caught.value.always
    opened.compares, opened._next = False, 0
    if by_all:
        assert str(file) in refused_call(opened.poll)
    else:
        opened.poll()
        opened.refuse_change()


@pytest.mark.parametrize(
    "touch", [os.utime, lambda file: replaced(file, file.read_bytes())], ids=["touched", "replaced by an equal one"]
)
def test_equal_content_is_no_change(file, opened, touch, capsys):
    touch(file)
    opened.refuse_change()
    assert capsys.readouterr().err == f"note: {file}: has another time or inode, and the same content\n"
    opened.refuse_change()
    assert capsys.readouterr().err == ""


def test_a_large_file_is_refused_without_being_hashed(file, opened, monkeypatch):
    monkeypatch.setattr(opened_files, "HASHED_BYTES", 100)
    os.utime(file)
    assert "was changed while it is used" in refused_call(opened.refuse_change)


@pytest.mark.parametrize("position", [0, 2000, -1])
def test_content_that_changed_behind_the_time_is_found(file, opened, position):
    """A device that loses a bit, or a tool that restores times; where the content was hashed when it was opened."""
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    overwrite(file, position % file.stat().st_size)
    os.utime(file, ns=times)
    assert "its content is another one, though its size and time are the same" in refused_call(opened.refuse_change)
    unhashed = PackedDataset.open(file.parent / "set", 128).files
    unhashed.refuse_change()


def test_files_are_looked_at_now_and_then(file, opened, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(opened_files.time, "monotonic", lambda: now[0])
    opened._next = 1000.0 + opened_files.INTERVAL
    os.truncate(file, 10)
    opened.poll()
    now[0] += opened_files.INTERVAL
    refused_call(opened.poll)
    opened.poll()


def test_a_file_system_that_does_not_answer_is_no_change_until_an_epoch_ends(opened, monkeypatch):
    def fail(path):
        raise OSError(5, os.strerror(5), str(path))

    monkeypatch.setattr(opened_files.os, "stat", fail)
    opened._next = 0
    opened.poll()
    assert "it cannot be found any more (Input/output error: the device" in refused_call(opened.refuse_change)


def test_a_device_that_fails_is_not_taken_for_a_damaged_file(file, monkeypatch, capsys):
    def fail(path, mmap_mode):
        raise OSError(5, os.strerror(5), str(path))

    monkeypatch.setattr(np, "load", fail)
    assert run_command(lambda: PackedDataset.open(file.parent / "set", 128)) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"error: {file.parent / 'set_task_ids.npy'}: Input/output error: the device or the connection"
    )
