"""Processes of a job as Linux shows them: descendants of a process, also those that other processes left behind."""

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

from mft_megatron import process_table

PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that none is out of sight."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def parents() -> dict[int, int]:
    """The parent of each process of this machine, by process; processes that have ended and wait to be reaped are not
    among them."""
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            process = process_table.look_up(int(entry.name))
            if process is not None and not process.ended:
                found[int(entry.name)] = process.parent
    return found


def descendants(root: int) -> list[int]:
    """Processes below ``root``, parents before their children."""
    children: dict[int, list[int]] = {}
    for process, parent in parents().items():
        children.setdefault(parent, []).append(process)
    found = [root]
    for process in found:
        found += sorted(children.get(process, ()))
    return found[1:]


def children(root: int) -> list[int]:
    """Processes that ``root`` has started itself, in the order of their numbers."""
    return sorted(process for process, parent in parents().items() if parent == root)


def kill(processes: list[int], number: int = signal.SIGKILL) -> None:
    """Send a signal to processes; those that have ended meanwhile need none."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def describe(process: int) -> str:
    """A process in a line: its number, its command line and where it waits."""
    with contextlib.suppress(OSError):
        folder = Path("/proc", str(process))
        words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        entry = process_table.look_up(process)
        return f"{process} [{entry.state if entry else '?'}] {words[:160]}"
    return f"{process} (gone)"


def wait_until_gone(root: int, seconds: float) -> tuple[float, list[int]]:
    """Wait until nothing is left below ``root``; returns the seconds that took, and the processes that remain."""
    start = time.monotonic()
    while True:
        left, waited = descendants(root), time.monotonic() - start
        if not left or waited > seconds:
            return waited, left
        time.sleep(0.01)
