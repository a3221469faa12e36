"""Free space of a run folder's file system, asked before a checkpoint is written."""

import errno
import shutil
from pathlib import Path

from mft_megatron.disk_errors import NoRoomError

# files besides the tensors: the index, the common state, headers of tensors
_MARGIN = 1 << 20


def refuse_without_room(folder: Path, needed: int) -> None:
    """Check that a checkpoint fits; nothing on file systems that have no numbers.

    A quota is not asked for: that one is used up shows when writing.

    Args:
        folder: the run folder, which exists.
        needed: bytes of the tensors that are to be written.

    Raises:
        NoRoomError: it does not fit; the error has the number of a full disk.
        OSError: the file system does not answer.
    """
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < needed + needed // 100 + _MARGIN:
        said = f"it needs {needed / 1e6:,.0f} MB, and {usage.free / 1e6:,.0f} MB are free"
        raise NoRoomError(errno.ENOSPC, said, str(folder))
