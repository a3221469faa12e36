"""States of processes of this machine in words."""

import os

from mft_megatron import process_table

STOPPED, GONE = "stopped by a signal", "gone"
_STATES = {"T": STOPPED, "t": "stopped by a debugger", "D": "waits for a disk or a device", "Z": GONE, "X": GONE}


def born(pid: int) -> int:
    """When a process began, in clock ticks since the start of the machine; 0 where that is not known."""
    entry = process_table.look_up(pid)
    return 0 if entry is None else entry.started


def state_of(pid: int, since: int) -> str | None:
    """The state of a process in words, if that explains why it makes no progress.

    Args:
        pid: its process id.
        since: its :func:`born`, as it was when the process was known.

    Returns:
        ``None`` for a process that runs or sleeps, and where nothing can be known.
    """
    if not since or not process_table.is_shown():
        return None
    entry = process_table.look_up(pid)
    if entry is None or entry.started != since:
        return GONE
    return _STATES.get(entry.state)


def this_process() -> tuple[int, int]:
    """Process id of this process and when it began."""
    return os.getpid(), born(os.getpid())
