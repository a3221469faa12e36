"""A lock on a file, and how far locks of a file system reach.

``flock`` is the kernel's: it ends with the processes that hold it, however they end. Whether machines that share a file
system see each other's locks depends on how it is mounted.
"""

import contextlib
import enum
import errno
import fcntl
import os
from pathlib import Path

# what flock says where a file system, or the server behind it, has no locks
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
# file systems of one machine, and those of many machines that share their locks
_OF_ONE_MACHINE = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "overlay", "apfs")
_OF_ALL_MACHINES = ("gpfs", "ceph", "gfs2", "ocfs2")
# mount options by which locks of NFS stay on the machine
_NFS_LOCAL = {"nolock", "local_lock=all", "local_lock=flock"}


class Reach(enum.Enum):
    """Extent to which locks of a file system are seen, as a clause for messages."""

    ALL = "every machine sees its locks"
    HOST = "only processes of the same machine see its locks"
    UNKNOWN = "it does not say who sees its locks"


class Attempt(enum.Enum):
    """Result of an attempt to get a lock."""

    HELD = "held by this process"
    REFUSED = "held by another process"
    IMPOSSIBLE = "the file system has no locks"


class FileLock:
    """An exclusive lock on a file, which is made if needed.

    Processes that this one forks hold it too, until they have ended or it is released.
    """

    def __init__(self, path: Path):
        self._path = path
        self._descriptor: int | None = None

    def acquire(self) -> Attempt:
        """Get the lock if no other process holds it; does not wait.

        Raises:
            OSError: the file cannot be made.
        """
        while self._descriptor is None:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    return Attempt.REFUSED
                if error.errno in _NO_LOCKS:
                    return Attempt.IMPOSSIBLE
                raise
            if self._names(descriptor):
                self._descriptor = descriptor
            else:  # its holder removed the file while this process opened it
                os.close(descriptor)
        return Attempt.HELD

    def release(self) -> None:
        """Remove the file and end the lock, also for processes that were forked; nothing if it is not held."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)
        self._descriptor = None

    def remove_file(self) -> None:
        """Remove the file of a lock that a machine which is gone will never end; then :meth:`acquire` makes another."""
        self._path.unlink(missing_ok=True)

    def _names(self, descriptor: int) -> bool:
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(descriptor), there)


def reach_of_locks(folder: Path, mounts: str | None = None) -> Reach:
    """Find out who sees the locks of the file system that holds ``folder``.

    Args:
        folder: exists.
        mounts: text in the form of Linux's ``/proc/self/mountinfo``, by default that file.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text()
        except OSError:
            return Reach.UNKNOWN
    kind, options = _mounted(folder.resolve(), mounts)
    if kind in ("nfs", "nfs4"):
        return Reach.HOST if options & _NFS_LOCAL else Reach.ALL
    if kind == "lustre":
        return Reach.ALL if "flock" in options else Reach.HOST
    if kind in _OF_ONE_MACHINE or kind in _OF_ALL_MACHINES:
        return Reach.ALL
    return Reach.UNKNOWN


def _mounted(folder: Path, mounts: str) -> tuple[str, set[str]]:
    """Kind and options of the file system that holds a folder; the newest mount at the deepest mount point counts."""
    kind, options, deepest = "", set[str](), -1
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4].encode().decode("unicode_escape"))
        if folder.is_relative_to(point) and len(point.parts) >= deepest:
            deepest = len(point.parts)
            kind, _, of_all = after.split(" ", 2)
            options = {*before.split()[5].split(","), *of_all.strip().split(",")}
    return kind, options
