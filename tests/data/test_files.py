"""Writing a data set: one process at a time, nothing left of runs that were killed, full disks told apart."""

import errno
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from mft_megatron.data import files as module
from mft_megatron.data.files import DatasetFiles, disk_full_named, refuse_too_small_a_disk
from mft_megatron.errors import InputError


def test_two_processes_do_not_write_to_one_prefix(tmp_path):
    code = (
        "import sys; from mft_megatron.data.files import DatasetFiles\n"
        "with DatasetFiles(sys.argv[1]): print('writing', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "set")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "writing\n"
        with (
            pytest.raises(InputError, match="another process is writing this data set"),
            DatasetFiles(tmp_path / "set"),
        ):
            pass
        with DatasetFiles(tmp_path / "set2"):  # another prefix, in the same folder
            pass
        other.communicate()
    with DatasetFiles(tmp_path / "set"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed_by_the_next_one_alone(tmp_path):
    def killed(name):
        files = DatasetFiles(tmp_path / name)
        files.__enter__()
        files.save("_x.npy", np.zeros(3))
        files._lock.close()  # what the system does when a process is killed

    killed("set")
    killed("set_b")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".set.writing", ".set.lock", ".set_b.writing", ".set_b.lock"}
    with DatasetFiles(tmp_path / "set"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".set_b.writing", ".set_b.lock"}


def test_what_was_not_published_is_discarded(tmp_path):
    def fail():
        with DatasetFiles(tmp_path / "new" / "set") as files:
            files.save("_x.npy", np.zeros(3))
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_refused_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    refuse_too_small_a_disk(tmp_path / "not" / "there", 10**9)
    with pytest.raises(InputError, match=r"1\.00 GB are free, and about 2\.00 GB are needed"):
        refuse_too_small_a_disk(tmp_path / "not" / "there", 2 * 10**9)


def test_a_disk_that_gets_full_is_one_line(tmp_path):
    with (
        pytest.raises(InputError, match=r"_x\.npy: the disk is full .* nothing was completed"),
        disk_full_named(tmp_path),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "_x.npy"))
    with pytest.raises(PermissionError), disk_full_named(tmp_path / "set"):
        raise PermissionError(errno.EACCES, "no", "x")
