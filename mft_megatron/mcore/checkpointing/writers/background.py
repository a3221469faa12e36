"""A process behind a rank that does one thing with what is in the rank's memory now, while the rank goes on.

It is forked, so it starts at once and sees the memory as it was. It takes no signal that asks the rank to leave, ends
with the rank, has no stream of it, and its result comes back through a file in memory, of any length.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import gc
import os
import pickle
import signal
import warnings
from collections.abc import Callable
from typing import Generic, NoReturn, TypeVar

from mft_megatron.parent_process import end_with_parent

T = TypeVar("T")

# signals on which a rank saves and leaves; a group of processes gets them together
_OF_THE_RANK = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Background(Generic[T]):
    """One function that runs in a process behind this one."""

    def __init__(self, work: Callable[[], T]):
        """Start the process.

        Args:
            work: what it does, without CUDA and without collectives; its result or error is pickled.

        Raises:
            OSError: there is no memory or no place for another process.
        """
        self._answer = os.memfd_create("background", os.MFD_CLOEXEC)
        parent = os.getpid()
        with warnings.catch_warnings():
            # Python 3.12 warns about threads, which the new process does not have; it starts its own
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process = os.fork()
        if not self._process:
            _run(work, self._answer, parent)
        self._status: int | None = None

    @property
    def ended(self) -> bool:
        """Whether the process has ended; does not wait."""
        if self._status is None:
            self._wait(os.WNOHANG)
        return self._status is not None

    def result(self) -> T:
        """Wait for the process, and return what its function returned; call it once.

        Raises:
            Exception: the function's.
            ChildProcessError: the process ended without a result.
        """
        if self._status is None:
            self._wait(0)
        with open(self._answer, "rb") as file:
            file.seek(0)
            content = file.read()
        if self._status or not content:
            raise ChildProcessError(f"the writing process ended with status {self._status} and said nothing")
        succeeded, answer = pickle.loads(content)
        if not succeeded:
            raise answer
        result: T = answer
        return result

    def _wait(self, options: int) -> None:
        process, status = os.waitpid(self._process, options)
        if process:
            self._status = os.waitstatus_to_exitcode(status)


def _run(work: Callable[[], object], answer: int, parent: int) -> NoReturn:
    """Be the process behind: work, leave the answer, and end without what Python does at an exit."""
    code = 1
    try:
        # what the rank has on a device must not be freed here
        gc.disable()
        for number in _OF_THE_RANK:
            signal.signal(number, signal.SIG_IGN)
        end_with_parent(parent, silent=True)
        try:
            content = pickle.dumps((True, work()))
        except Exception as error:
            content = _pickled(error)
        with open(answer, "wb", closefd=False) as file:
            file.write(content)
        code = 0
    finally:
        os._exit(code)


def _pickled(error: Exception) -> bytes:
    """An error with its number and file, which exceptions that hold others lose, or what it says."""
    try:
        content = pickle.dumps((False, error))
        pickle.loads(content)
    except Exception:
        content = pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
    return content
