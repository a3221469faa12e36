"""Processes that end when the process that started them ends, however that happens.

A killed launcher cannot end its ranks, nor a killed rank its writers and exports: they would go on beside the job that
is started in their place, and hold its pipes open. So each asks the kernel to be ended with its parent, where Linux can
do that, and looks every second in a thread whether the parent is still there, for what the kernel does not cover.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mft_megatron import launcher, process_table

# the option of Linux's prctl that sets the signal a process gets when its parent ends
_PR_SET_PDEATHSIG = 1
# seconds between two looks at the parent, and those that a process has to end itself before it is killed
_INTERVAL, _GRACE = 1.0, 5.0
# of a process that must end with its parent and is told so by its environment: the parent's process id
_VARIABLE = "MFT_END_WITH"


def end_with_parent(parent: int | None = None, gently: bool = False, silent: bool = False) -> None:
    """End this process within seconds when its parent has ended.

    A forked process does not inherit this: it calls it too.

    Args:
        parent: process id of the parent, where the caller knows it; otherwise the parent of this moment.
        gently: send SIGTERM first, so that the process can remove what is unfinished; it is killed 5 s later.
        silent: give up the standard output and error streams that were inherited, since a pipe is only closed, and its
            reader only returns, when the last process that holds it has ended.
    """
    if silent:
        _leave_output()
    _watch(((os.getpid(), os.getppid() if parent is None else parent),), gently)


def end_with_launcher(environment: Mapping[str, str]) -> None:
    """End this rank within seconds when torchrun, srun's or mpirun's process that started it ends.

    A script between them, which sets variables or binds CPUs, may be the parent: the first process above that is not
    itself such a rank is the launcher. A process by itself, or a rank that was started by hand, does not end with its
    parent, which may be a shell that somebody leaves.

    Args:
        environment: of the process, as the launcher made it.
    """
    variable = launcher.rank_variable(environment)
    if variable is None:
        return
    links, rank = [(os.getpid(), os.getppid())], f"{variable}={environment[variable]}".encode()
    while rank in _environment_of(links[-1][1]):
        links.append((links[-1][1], _parent_of(links[-1][1])))
    _watch(links, gently=False)


def ask_kernel(signal_number: int = signal.SIGKILL) -> bool:
    """Ask the kernel to send a signal to this process when the thread that started it ends.

    It holds after ``exec`` too, so it can be the ``preexec_fn`` of a program that knows nothing of it.

    Returns:
        whether the kernel can do that, which is so on Linux.
    """
    if not sys.platform.startswith("linux"):
        return False
    return ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0) == 0


def told_to_end_with_this(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for a command of this project that is to end when this process ends."""
    return {**environment, _VARIABLE: str(os.getpid())}


def end_as_told(gently: bool = True) -> None:
    """End with the parent if this process was started with :func:`told_to_end_with_this`; its children are not."""
    parent = os.environ.pop(_VARIABLE, None)
    if parent is not None:
        end_with_parent(int(parent), gently)


def _watch(links: Sequence[tuple[int, int]], gently: bool) -> None:
    """Watch pairs of a process and its parent, this process first, and end this process when one of them breaks."""
    parent = links[0][1]
    # The kernel's signal comes when a thread ends. Only the main thread is known to live as long as its process.
    if _started_by_main_thread(parent):
        ask_kernel(signal.SIGTERM if gently else signal.SIGKILL)
    if not _intact(links):  # it ended before it was watched
        _end(gently)
    threading.Thread(target=_poll, args=(tuple(links), gently), name="parent process", daemon=True).start()


def _poll(links: Sequence[tuple[int, int]], gently: bool) -> None:
    while _intact(links):
        time.sleep(_INTERVAL)
    _end(gently)


def _intact(links: Sequence[tuple[int, int]]) -> bool:
    return all(_parent_of(process) == parent for process, parent in links)


def _end(gently: bool) -> None:
    if gently:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def _started_by_main_thread(parent: int) -> bool:
    """Whether the main thread of the parent started this process; unknown counts as no."""
    threads = Path(f"/proc/{parent}/task")
    try:
        if len(os.listdir(threads)) == 1:
            return True
        # not every kernel has this file
        return str(os.getpid()) in (threads / str(parent) / "children").read_text().split()
    except OSError:
        return False


def _parent_of(process: int) -> int:
    """Process id of the parent of a process; 0 where it has ended or cannot be asked."""
    if process == os.getpid():
        return os.getppid()
    entry = process_table.look_up(process)
    return 0 if entry is None else entry.parent


def _environment_of(process: int) -> list[bytes]:
    """Entries of the environment that a process was started with; none where it cannot be read."""
    try:
        return Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _leave_output() -> None:
    """Send standard output and standard error nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)
