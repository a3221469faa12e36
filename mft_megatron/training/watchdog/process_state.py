"""The state of a process of this machine, as Linux's ``/proc`` shows it."""

import os
from pathlib import Path

STOPPED, GONE = "stopped by a signal", "gone"
_STATES = {"T": STOPPED, "t": "stopped by a debugger", "D": "waits for a disk or a device", "Z": GONE, "X": GONE}


def born(pid: int) -> int:
    """When a process began, in clock ticks since the start of the machine; 0 where that is not known."""
    found = _fields(pid)
    return int(found[19]) if found else 0


def state_of(pid: int, since: int) -> str | None:
    """The state of a process in words, if that explains why it makes no progress.

    Args:
        pid: its process id.
        since: its :func:`born`, as it was when the process was known.

    Returns:
        ``None`` for a process that runs or sleeps, and where nothing can be known.
    """
    if not since or not Path("/proc/self/stat").exists():
        return None
    found = _fields(pid)
    if not found or int(found[19]) != since:
        return GONE
    return _STATES.get(found[0])


def _fields(pid: int) -> list[str]:
    """Fields of ``/proc/PID/stat`` from the state on; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return []


def this_process() -> tuple[int, int]:
    """Process id of this process and when it began."""
    return os.getpid(), born(os.getpid())
