"""Locks on files, and how far those of a file system reach."""

import pytest

from mft_megatron.run_folder.owner.file_lock import Attempt, FileLock, Reach, reach_of_locks

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
31 22 0:40 / /home rw shared:9 - nfs4 server:/home rw,vers=4.2,local_lock=none
32 22 0:41 / /data/n rw - nfs server:/n rw,vers=3,nolock,local_lock=all
33 22 0:42 / /lustre/a rw - lustre 10.0.0.1@o2ib:/a rw,flock,lazystatfs
34 22 0:43 / /lustre/b rw - lustre 10.0.0.1@o2ib:/b rw,localflock
35 22 0:44 / /lustre/c rw - lustre 10.0.0.1@o2ib:/c rw,lazystatfs
36 22 0:45 / /gpfs rw,noatime - gpfs fs1 rw
37 22 0:46 / /bee rw - beegfs beegfs_nodev rw
38 22 0:47 / /s3 rw - fuse.s3fs s3fs rw
39 22 0:48 / /with\\040space rw - xfs /dev/sdb rw
40 22 0:49 / /twice rw - xfs /dev/sdc rw
41 40 0:50 / /twice rw - nfs server:/t rw,nolock
"""


@pytest.mark.parametrize(
    ("folder", "reach"),
    [
        ("/var/run", Reach.ALL),
        ("/home/me/run", Reach.ALL),
        ("/homes/me", Reach.ALL),  # of /
        ("/data/n/run", Reach.HOST),
        ("/lustre/a/run", Reach.ALL),
        ("/lustre/b/run", Reach.HOST),
        ("/lustre/c/run", Reach.HOST),
        ("/gpfs/run", Reach.ALL),
        ("/bee/run", Reach.UNKNOWN),
        ("/s3/run", Reach.UNKNOWN),
        ("/with space/run", Reach.ALL),
        ("/twice/run", Reach.HOST),
    ],
)
def test_how_far_locks_reach(folder, reach, monkeypatch):
    from pathlib import Path

    monkeypatch.setattr(Path, "resolve", lambda self: self)
    assert reach_of_locks(Path(folder), MOUNTS) is reach


def test_one_holder_at_a_time(tmp_path):
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.acquire() is first.acquire() is Attempt.HELD
    assert second.acquire() is Attempt.REFUSED
    second.release()
    assert second.acquire() is Attempt.REFUSED
    first.release()
    assert list(tmp_path.iterdir()) == []
    assert second.acquire() is Attempt.HELD


def test_a_lock_on_a_file_that_its_holder_has_just_removed_is_none(tmp_path, monkeypatch):
    import os

    path, opened = tmp_path / "lock", []
    stale = os.open(path, os.O_RDWR | os.O_CREAT)
    path.unlink()
    real = os.open

    def open_stale_first(*arguments):
        opened.append(stale if not opened else real(*arguments))
        return opened[-1]

    monkeypatch.setattr("mft_megatron.run_folder.owner.file_lock.os.open", open_stale_first)
    first, second = FileLock(path), FileLock(path)
    assert first.acquire() is Attempt.HELD
    assert len(opened) == 2
    assert second.acquire() is Attempt.REFUSED


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    import errno

    def refuse(*_):
        raise OSError(errno.ENOSYS, "not implemented")

    monkeypatch.setattr("mft_megatron.run_folder.owner.file_lock.fcntl.flock", refuse)
    assert FileLock(tmp_path / "lock").acquire() is Attempt.IMPOSSIBLE
