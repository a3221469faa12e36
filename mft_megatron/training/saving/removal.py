"""Checkpoints are removed behind a run: the files of a large one take minutes, and no rank waits for a disk."""

import shutil
import threading
from collections import deque
from pathlib import Path

from mft_megatron.disk_errors import explain
from mft_megatron.run_folder.publishing import set_aside


class Removal:
    """Removes checkpoints one after the other, in a thread that ends with the process."""

    def __init__(self):
        self._waiting: deque[Path] = deque()
        self._thread: threading.Thread | None = None
        self._problems: deque[str] = deque()

    def add(self, checkpoint: Path) -> None:
        """Remove a checkpoint, which is none any more when this returns, and its files later.

        What is not removed when the process ends is a leftover, and removed when the run starts again.

        Raises:
            OSError: it cannot be renamed, and is still a checkpoint.
        """
        self._waiting.append(set_aside(checkpoint))
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._remove, name="removal of checkpoints", daemon=True)
            self._thread.start()

    def problems(self) -> list[str]:
        """Lines about files that could not be removed since the last call."""
        return [self._problems.popleft() for _ in range(len(self._problems))]

    def finish(self) -> None:
        """Wait until all that was added is removed."""
        while self._thread is not None:
            self._thread.join()
            self._thread = None
            self._remove()  # what was added while the thread ended

    def _remove(self) -> None:
        while self._waiting:
            folder = self._waiting.popleft()
            try:
                shutil.rmtree(folder)
            except OSError as error:
                self._problems.append(f"{folder} cannot be removed ({explain(error, folder)}); remove it")
