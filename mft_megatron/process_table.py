"""Entries of the kernel's table of processes, which Linux shows in ``/proc``."""

import contextlib
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """A process by what the kernel says of it.

    Attributes:
        state: a letter, such as R, S, D, T, or Z of one that has ended and nobody has waited for.
        parent: process id of its parent.
        started: when it started, in ticks of this kernel; with the process id that identifies it.
    """

    state: str
    parent: int
    started: int

    @property
    def ended(self) -> bool:
        """Whether it has ended, and only its entry is left."""
        return self.state in "ZX"


def look_up(process: int) -> Process | None:
    """The entry of a process; ``None`` if there is none, or where the machine does not show it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # the name of the program, in parentheses, may contain anything
        fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return Process(fields[0], int(fields[1]), int(fields[19]))
    return None


def is_shown() -> bool:
    """Whether this machine shows its processes, so that one without an entry does not exist."""
    return Path("/proc/self/stat").exists()
