"""The files of a data set while they are being written: under temporary names, until all of them take their places.

Only one process at a time writes to a prefix. A run that was killed leaves a hidden folder behind, which the next run
to the same prefix takes over.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mft_megatron.errors import InputError

from .ledger import ArrayEntry, Ledger, file_sha256, ledger_path, read_ledger


class DatasetWriter:
    """Writes the data set ``prefix``; use it in a ``with`` statement, which discards what was not published."""

    def __init__(self, prefix: str | Path):
        self.prefix = Path(prefix)
        self._ends: list[str] = []
        self._kept: dict[str, ArrayEntry] = {}

    def __enter__(self) -> "DatasetWriter":
        """
        Raises:
            InputError: another process is writing to the same prefix.
        """
        self._new_folders = [folder for folder in self.prefix.parents if not folder.exists()]
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._lock_path = self._hidden(".lock")
        self._lock = open(self._lock_path, "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise InputError(f"{self.prefix}: another process is writing this data set; wait for it") from None
        self._remove_unpublished()
        self._folder.mkdir(exist_ok=True)
        return self

    def __exit__(self, *error) -> None:
        self._remove_unpublished()
        self._lock_path.unlink(missing_ok=True)
        self._lock.close()
        with contextlib.suppress(OSError):  # not empty: it is in use
            for folder in self._new_folders:
                folder.rmdir()

    @property
    def cache_folder(self) -> Path:
        """Where encoded parts are kept until the data set is complete."""
        return self._folder / "parts"

    def new(self, end: str) -> Path:
        """Where to write the file whose name ends with ``end``."""
        self._ends.append(end)
        return self._temporary(end)

    def save(self, end: str, values: np.ndarray) -> None:
        """Write one array."""
        values = np.ascontiguousarray(values)
        with open(self.new(end), "wb") as file:
            # np.save would not say which error it is that the disk is full
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
            file.write(values.data if values.size else b"")

    def keep(self, end: str, entry: ArrayEntry) -> None:
        """Let a file of the data set that is there already stay part of it."""
        self._kept[end] = entry

    def entries(self) -> dict[str, ArrayEntry]:
        """Size and hash of every file, after making sure that it is on disk."""
        entries = dict(self._kept)
        for end in self._ends:
            path = self._temporary(end)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            entries[end] = ArrayEntry(path.stat().st_size, file_sha256(path))
        return entries

    def publish(self, ledger: Ledger) -> None:
        """Move all files to their places, the ledger last; between, there is no data set rather than a mixed one."""
        target = ledger_path(self.prefix)
        with open(self.new("_dataset.json"), "w", encoding="utf-8") as file:
            file.write(ledger.to_json())
            file.flush()
            os.fsync(file.fileno())
        stale = self._files_of_the_data_set_before() - set(self._ends) - set(self._kept)
        if any(Path(f"{self.prefix}{end}").exists() for end in self._ends[:-1]):
            target.unlink(missing_ok=True)  # where names are only added, the data set before stays one to the end
        for end in self._ends:
            os.replace(self._temporary(end), f"{self.prefix}{end}")
        for end in stale:
            Path(f"{self.prefix}{end}").unlink(missing_ok=True)
        folder = os.open(self.prefix.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _files_of_the_data_set_before(self) -> set[str]:
        try:
            return set(read_ledger(self.prefix).arrays)
        except InputError:
            return set()

    @property
    def _folder(self) -> Path:
        return self._hidden(".writing")

    def _temporary(self, end: str) -> Path:
        return self._folder / f"data{end}"

    def _remove_unpublished(self) -> None:
        """Of this run or of one that was killed; parts are for their owner to remove."""
        for path in self._folder.glob("data_*"):
            path.unlink()
        with contextlib.suppress(OSError):  # there are parts, or there is no such folder
            self._folder.rmdir()

    def _hidden(self, end: str) -> Path:
        return self.prefix.with_name(f".{self.prefix.name}{end}")


def require_free_space(folder: Path, needed: int) -> None:
    """Refuse to begin what will not fit.

    Args:
        folder: where files are to be written; it or a parent of it exists.
        needed: bytes.

    Raises:
        InputError: less than that is free.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder}: cannot be written to; choose another --output-prefix")
    if free < needed:
        raise InputError(
            f"{folder}: {free / 1e6:,.0f} MB are free, and about {needed / 1e6:,.0f} MB are needed; make room, or "
            "choose another --output-prefix"
        )


@contextlib.contextmanager
def report_full_disk(prefix: Path, option: str = "--output-prefix") -> Iterator[None]:
    """Turn a full disk inside the block into the one line for the user.

    Raises:
        InputError: the disk, or the user's share of it, is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(prefix.parent if prefix.parent.exists() else ".").free
        where = error.filename or prefix.parent
        raise InputError(
            f"{where}: the disk is full ({free / 1e6:.0f} MB free); nothing was completed. Make room, or choose "
            f"another {option}"
        ) from None
