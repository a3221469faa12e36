"""TensorBoard, as a run writes it: what it cannot write ends the board and not the run."""

import threading
from collections.abc import Mapping

from mft_megatron.disk_errors import explain


class Board:
    """A TensorBoard writer that stops at the first scalars that it cannot write.

    Attributes:
        folder: of its event files.
    """

    def __init__(self, folder: str, queue_size: int):
        """Open the board.

        Raises:
            OSError: its folder cannot be written.
        """
        # imported here because it takes long, and most ranks write to no board
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        # before the thread is started, which can fail at once
        self._hook_before = threading.excepthook
        threading.excepthook = self._of_thread
        self._writer: SummaryWriter | None = SummaryWriter(folder, max_queue=queue_size)

    def write(self, scalars: Mapping[str, float], step: int) -> str | None:
        """Write scalars; returns the reason if that fails, after which nothing is written any more."""
        if self._writer is None:
            return None
        try:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)
        except OSError as error:
            self.close()
            return explain(error, self.folder)
        return None

    def close(self) -> str | None:
        """Write what is queued, and close the files; returns the reason if that fails."""
        writer, self._writer = self._writer, None
        if writer is None:
            return None
        try:
            writer.close()
        except OSError as error:
            return explain(error, self.folder)
        finally:
            threading.excepthook = self._hook_before
        return None

    def _of_thread(self, failed: threading.ExceptHookArgs) -> None:
        """Drop the traceback of TensorBoard's thread: :meth:`write` raises the same error."""
        of_board = type(failed.thread).__module__.startswith("tensorboard.")
        if not (of_board and isinstance(failed.exc_value, OSError)):
            self._hook_before(failed)
