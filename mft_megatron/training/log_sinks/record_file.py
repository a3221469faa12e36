"""A file of lines that a run appends to, also while its disk takes nothing."""

import contextlib
import json
import os
from pathlib import Path


class RecordFile:
    """Appends whole lines; those that cannot be written wait, in order, until it is possible again.

    Attributes:
        waiting: lines that are not in the file yet.
        cut_off: bytes of a last line without its end, which a process that was killed had begun; it is removed.
    """

    def __init__(self, path: Path):
        """Open ``path`` to append to it; a last line that is JSON only lacks its end, and gets it.

        Raises:
            OSError: it cannot be opened.
        """
        self.waiting: list[bytes] = []
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        # length of the file without the line of which only a part was written
        self._whole: int | None = None
        self.cut_off = self._end_last_line(path)

    def write(self, line: str) -> OSError | None:
        """Append the lines that wait, and this one; returns the error if it has to wait."""
        self.waiting.append(f"{line}\n".encode())
        return self._write_waiting()

    def close(self) -> OSError | None:
        """Try once more what waits, and close the file; returns the error if lines are lost."""
        error = self._write_waiting()
        try:
            os.close(self._file)
        except OSError as at_close:  # network file systems report here what they could not write
            return at_close
        return error

    def _end_last_line(self, path: Path) -> int:
        """Remove a part of a line at the end of the file, which would make the next line unreadable, too."""
        if not Path(path).is_file():  # a device
            return 0
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            last = b""
            while len(last) < size and b"\n" not in last:
                length = min(size, max(2 * len(last), 1 << 16))
                file.seek(size - length)
                last = file.read(length)
        last = last.rpartition(b"\n")[2]
        try:
            json.loads(last or "0")
        except ValueError:
            os.ftruncate(self._file, size - len(last))
            return len(last)
        if last:
            os.write(self._file, b"\n")
        return 0

    def _write_waiting(self) -> OSError | None:
        while self.waiting:
            try:
                self._append(self.waiting[0])
            except OSError as error:
                with contextlib.suppress(OSError):
                    self._remove_part()
                return error
            del self.waiting[0]
        return None

    def _append(self, line: bytes) -> None:
        self._remove_part()
        self._whole = os.fstat(self._file).st_size
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(self._file, rest) :]
        self._whole = None

    def _remove_part(self) -> None:
        """Shorten the file to whole lines, which a full disk permits."""
        if self._whole is not None and os.fstat(self._file).st_size > self._whole:
            os.ftruncate(self._file, self._whole)
        self._whole = None
