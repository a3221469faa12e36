"""The files of a data set as they were when it was opened, so that a change of one under a run is noticed.

Every process looks at the files' sizes now and then, which costs a few microseconds, and one process of each machine at
their inodes and times, too. A file that was only touched, or replaced by an equal one, is told by its hash. At the end
of an epoch blocks of each file are compared with what they held when the whole content was hashed, which also finds
changes that left the time alone.
"""

import errno
import hashlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mft_megatron.disk_errors import explain
from mft_megatron.errors import InputError

from .ledger import ArrayEntry, file_sha256

# seconds between two looks at the files
INTERVAL = 30.0
# a file that has another time is hashed if it has at most so many bytes, and refused otherwise
HASHED_BYTES = 16 * 2**30
# blocks of a file that are compared at the end of an epoch, and bytes of each
BLOCKS, BLOCK_BYTES = 64, 4096


class FileIdentity(NamedTuple):
    """A file by what its file system says of it.

    Attributes:
        device, inode: which file it is; another one was moved to the path where they differ.
        size: bytes.
        modified: time of the last change, ns since 1970.
    """

    device: int
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> "FileIdentity":
        """Ask the file system about the file at ``path``."""
        status = os.stat(path)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.modified / 1e9))
        return f"{self.size} bytes of {when}"


class OpenedFiles:
    """Files of a data set.

    Attributes:
        compares: whether this process compares more than sizes; others would read the same files at the same time.
    """

    def __init__(self, prefix: str | Path, arrays: Mapping[str, ArrayEntry]):
        """Look at the files.

        Args:
            prefix: of the data set.
            arrays: the ledger's entries, by suffix; a file that is missing is left to who opens it.
        """
        self.compares = True
        self._entries = {Path(f"{prefix}{suffix}"): entry for suffix, entry in arrays.items()}
        self._seen = {path: FileIdentity.of(path) for path in self._entries if path.is_file()}
        self._blocks: dict[Path, str] = {}
        self._next = time.monotonic() + INTERVAL

    def keep_blocks(self) -> None:
        """Remember some blocks of each file, after the content was compared with the ledger."""
        self._blocks = {path: _blocks_digest(path) for path in self._seen}

    def poll(self) -> None:
        """Look at the files if that was not done for a while.

        Raises:
            InputError: as :meth:`refuse_change`, without a look at blocks.
        """
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + INTERVAL
            for path in self._seen:
                self._refuse_change(path, certain=False)

    def refuse_change(self) -> None:
        """Check that all files are those that were opened.

        Raises:
            InputError: one was cut off, written to, replaced or deleted; of every process that sees it.
        """
        for path in self._seen:
            self._refuse_change(path, certain=True)
            if self.compares and path in self._blocks and self._blocks[path] != _blocks_digest(path):
                raise _changed(path, "its content is another one, though its size and time are the same")

    def _refuse_change(self, path: Path, certain: bool) -> None:
        before = self._seen[path]
        try:
            now = FileIdentity.of(path)
        except OSError as error:
            # a file system that does not answer for a moment must not end a run that reads no file
            if certain or error.errno == errno.ENOENT:
                raise _changed(path, f"it cannot be found any more ({explain(error, path)})") from None
            return
        if now == before or (now.size == before.size and not self.compares):
            return
        entry = self._entries[path]
        if now.size == before.size <= HASHED_BYTES and file_sha256(path) == entry.sha256:
            print(f"note: {path}: has another time or inode, and the same content", file=sys.stderr, flush=True)
            self._seen[path] = now
            return
        raise _changed(path, f"it had {before}, and has {now}")


def _changed(path: Path, how: str) -> InputError:
    """The error for a file that is no longer the one that was opened."""
    return InputError(
        f"{path}: was changed while it is used: {how}. What the ledger describes is no longer what would be read: stop "
        "what writes there, restore the file, or preprocess the data again under another --output-prefix, and continue "
        "from a checkpoint that was saved before that",
        always=True,
    )


def _blocks_digest(path: Path) -> str:
    """Digest of blocks that are spread evenly over a file, the first and the last one among them."""
    digest, size = hashlib.blake2b(digest_size=16), path.stat().st_size
    last = max(size - BLOCK_BYTES, 0)
    with open(path, "rb", buffering=0) as file:
        for start in sorted({last * number // (BLOCKS - 1) for number in range(BLOCKS)}):
            file.seek(start)
            digest.update(file.read(BLOCK_BYTES) or b"")
    return digest.hexdigest()
