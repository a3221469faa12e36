"""Writing a data set: one process at a time, files of killed runs are removed, a full disk is reported as one."""

import errno
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from mft_megatron.data.storage import dataset_writer as module
from mft_megatron.data.storage.dataset_writer import DatasetWriter, report_full_disk, require_free_space
from mft_megatron.errors import InputError


def test_two_processes_do_not_write_to_one_prefix(tmp_path):
    code = (
        "import sys; from mft_megatron.data.storage.dataset_writer import DatasetWriter\n"
        "with DatasetWriter(sys.argv[1]): print('writing', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "set")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "writing\n"
        with (
            pytest.raises(InputError, match="another process is writing this data set"),
            DatasetWriter(tmp_path / "set"),
        ):
            pass
        with DatasetWriter(tmp_path / "set2"):  # another prefix, in the same folder
            pass
        other.communicate()
    with DatasetWriter(tmp_path / "set"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_next_run_to_a_prefix_removes_files_of_a_killed_one(tmp_path):
    def killed(name):
        files = DatasetWriter(tmp_path / name)
        files.__enter__()
        files.save("_x.npy", np.zeros(3))
        files._lock.close()  # what the system does when a process is killed

    killed("set")
    killed("set_b")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".set.writing", ".set.lock", ".set_b.writing", ".set_b.lock"}
    with DatasetWriter(tmp_path / "set"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".set_b.writing", ".set_b.lock"}


def test_files_that_were_not_published_are_deleted(tmp_path):
    def fail():
        with DatasetWriter(tmp_path / "new" / "set") as files:
            files.save("_x.npy", np.zeros(3))
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_enough_space_is_refused_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9, total=10**10))
    require_free_space(tmp_path / "not" / "there", 10**9)
    with pytest.raises(InputError, match=r"1,000 MB are free, and about 2,000 MB are needed"):
        require_free_space(tmp_path / "not" / "there", 2 * 10**9)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=0, total=10**10))
    with pytest.raises(InputError, match=r"0 MB are free, and about 1 MB are needed"):
        require_free_space(tmp_path, 1)
    # a file system that does not tell
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=0, total=0))
    require_free_space(tmp_path, 1)


def test_a_disk_that_gets_full_is_one_line(tmp_path):
    with (
        pytest.raises(InputError, match=r"_x\.npy: the disk is full .* nothing was completed"),
        report_full_disk(tmp_path),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "_x.npy"))
    said = rf"^{tmp_path}/x: permission denied; .* Choose another --output-prefix"
    with pytest.raises(InputError, match=said), report_full_disk(tmp_path / "set"):
        raise PermissionError(errno.EACCES, "no", str(tmp_path / "x"))
    with pytest.raises(FileNotFoundError), report_full_disk(tmp_path / "set"):
        raise FileNotFoundError(errno.ENOENT, "no", "x")


def test_arrays_that_do_not_fit_are_a_full_disk(tmp_path, monkeypatch):
    """``np.save`` would hide the error number."""

    class Full:
        def __init__(self, file):
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, content):
            if memoryview(content).nbytes > 1000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._file.write(content)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self._file.close()

    def write(values):
        with report_full_disk(tmp_path / "set"), DatasetWriter(tmp_path / "set") as files:
            opened = open
            monkeypatch.setattr(module, "open", lambda *words: Full(opened(*words)), raising=False)
            files.save("_x.npy", values)

    write(np.zeros(3))
    with pytest.raises(InputError, match="the disk is full"):
        write(np.zeros(1000))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("values", [np.arange(12).reshape(3, 4)[:, ::2], np.zeros((2, 0), np.int64), np.uint16([1, 2])])
def test_arrays_are_written_as_numpy_writes_them(tmp_path, values):
    with DatasetWriter(tmp_path / "set") as files:
        files.save("_x.npy", values)
        loaded = np.load(tmp_path / ".set.writing" / "data_x.npy")
    np.testing.assert_array_equal(loaded, values)
    assert loaded.dtype == values.dtype


def test_the_previous_data_set_stays_valid_while_files_are_added(tmp_path, monkeypatch):
    """A run that packs for one more length and is killed must not damage the data set."""
    from mft_megatron.data.loading.dataset import PackedDataset
    from mft_megatron.data.packing.packing_options import PackingOptions
    from mft_megatron.data.preprocessing.repack import add_length
    from tests.made_dataset import write_dataset

    prefix = str(tmp_path / "set")
    write_dataset(prefix, 256)
    replace = os.replace

    def killed(source, target):
        if target.endswith("_dataset.json"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            add_length(prefix, PackingOptions(512, split=(1, 0, 0)))
    assert PackedDataset.open(prefix, 256, check="hashes").entry.packs
    add_length(prefix, PackingOptions(512, split=(1, 0, 0)))
    assert PackedDataset.open(prefix, 512, check="hashes").entry.packs
