"""Writing the files of a data set: under temporary names in a hidden folder until all are complete, then renamed.

Only one process at a time writes to a prefix. A run that was killed leaves its hidden folder behind, which the next run
to the same prefix reuses.
"""

import contextlib
import fcntl
import math
import os
import shutil
from collections.abc import Collection
from pathlib import Path

import numpy as np

from mft_megatron.errors import InputError, disk_reported

from .ledger import ArrayEntry, Ledger, file_sha256, read_ledger


class DatasetWriter:
    """Writes the data set ``prefix``.

    Use it in a ``with`` statement, which deletes files that were not published. Files are identified by their suffix:
    the file ``P_input_ids.bin`` of the data set ``P`` has the suffix ``_input_ids.bin``.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = Path(prefix)
        self._suffixes: list[str] = []
        self._kept: dict[str, ArrayEntry] = {}

    def __enter__(self) -> "DatasetWriter":
        """Lock the prefix and delete what a killed run left.

        Raises:
            InputError: another process is writing to the same prefix.
        """
        self._new_folders = [folder for folder in self.prefix.parents if not folder.exists()]
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._lock_path = self._hidden(".lock")
        self._lock = open(self._lock_path, "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise InputError(f"{self.prefix}: another process is writing this data set; wait for it") from None
        self._remove_unpublished()
        self._folder.mkdir(exist_ok=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._remove_unpublished()
        self._lock_path.unlink(missing_ok=True)
        self._lock.close()
        with contextlib.suppress(OSError):  # a folder that is not empty is in use
            for folder in self._new_folders:
                folder.rmdir()

    @property
    def cache_folder(self) -> Path:
        """Folder for encoded parts, which are kept until the data set is complete."""
        return self._folder / "parts"

    def new(self, suffix: str) -> Path:
        """Add a file to the data set and return the temporary path to write it to."""
        self._suffixes.append(suffix)
        return self._temporary(suffix)

    def save(self, suffix: str, values: np.ndarray) -> None:
        """Write an array of any shape as the ``.npy`` file with this suffix."""
        values = np.ascontiguousarray(values)
        with open(self.new(suffix), "wb") as file:
            # np.save would hide the error number that tells a full disk from other errors
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
            file.write(values.data if values.size else b"")

    def keep(self, suffix: str, entry: ArrayEntry) -> None:
        """Keep an existing file of the data set as a part of it."""
        self._kept[suffix] = entry

    def entries(self) -> dict[str, ArrayEntry]:
        """Return size and hash of every file, by suffix, after flushing the new ones to the disk."""
        entries = dict(self._kept)
        for suffix in self._suffixes:
            path = self._temporary(suffix)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            entries[suffix] = ArrayEntry(path.stat().st_size, file_sha256(path))
        return entries

    def publish(self, ledger: Ledger) -> None:
        """Rename all files to their final names, the ledger last; meanwhile there is no data set, never a mixed one."""
        stale = self._files_of_previous_ledger() - set(self._suffixes) - set(self._kept)
        self.publish_with("_dataset.json", ledger.to_json(), stale)

    def publish_with(self, last: str, description: str, stale: Collection[str] = ()) -> None:
        """Rename all files to their final names; a file that describes the others is the last.

        Args:
            last: suffix of that file.
            description: its content.
            stale: suffixes of files to delete.
        """
        target = Path(f"{self.prefix}{last}")
        with open(self.new(last), "w", encoding="utf-8") as file:
            file.write(description)
            file.flush()
            os.fsync(file.fileno())
        if any(Path(f"{self.prefix}{suffix}").exists() for suffix in self._suffixes[:-1]):
            target.unlink(missing_ok=True)  # files are only added otherwise, and the previous data set stays valid
        for suffix in self._suffixes:
            os.replace(self._temporary(suffix), f"{self.prefix}{suffix}")
        for suffix in stale:
            Path(f"{self.prefix}{suffix}").unlink(missing_ok=True)
        folder = os.open(self.prefix.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _files_of_previous_ledger(self) -> set[str]:
        try:
            return set(read_ledger(self.prefix).arrays)
        except InputError:
            return set()

    @property
    def _folder(self) -> Path:
        return self._hidden(".writing")

    def _temporary(self, suffix: str) -> Path:
        return self._folder / f"data{suffix}"

    def _remove_unpublished(self) -> None:
        """Delete unpublished files of this run or of one that was killed; encoded parts belong to their cache."""
        for path in self._folder.glob("data_*"):
            path.unlink()
        with contextlib.suppress(OSError):  # it still holds parts, or does not exist
            self._folder.rmdir()

    def _hidden(self, suffix: str) -> Path:
        return self.prefix.with_name(f".{self.prefix.name}{suffix}")


def require_free_space(folder: Path, needed: int) -> None:
    """Refuse to begin writing files that will not fit on the disk.

    Args:
        folder: for the files; it or a parent of it exists.
        needed: bytes.

    Raises:
        InputError: fewer bytes are free, or the folder is not writable.
    """
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder}: cannot be written to; choose another --output-prefix")
    if usage.free < needed and usage.total > 0:  # 0 where a file system does not tell
        raise InputError(
            f"{folder}: {usage.free / 1e6:,.0f} MB are free, and about {math.ceil(needed / 1e6):,} MB are needed; "
            "free some space, or choose another --output-prefix"
        )


def report_full_disk(prefix: Path, option: str = "--output-prefix") -> contextlib.AbstractContextManager[None]:
    """Turn a disk that is full or cannot be written, inside the block, into a one-line error.

    Args:
        prefix: of the files that are written.
        option: that chooses their folder, for the message.

    Raises:
        InputError: the disk or the user's quota is full, the disk is read-only or damaged, or permission is denied.
    """
    return disk_reported(prefix.parent, "nothing was completed", f"choose another {option}")
