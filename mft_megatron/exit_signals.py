"""Signals that ask a run to save and leave: remembered until a step is over, and obeyed at once where that cannot be.

::

    start ─── first signal: remembered; leaves before the first step, or after 20 s
    steps ─── first signal: remembered; all ranks save after the step and leave
    after ─── first signal: leaves at once (what is left to do is repeated by the next start)
    any   ─── a second signal, 5 s or more after the first: leaves at once, without saving

Python runs a signal's handler in the main thread only, and not while that waits in a collective. So a thread reads the
signals as well: it needs nothing of the main thread to end the process.
"""

import contextlib
import enum
import multiprocessing.util
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from mft_megatron.exit_codes import FAILED, LEFT

# SIGTERM: of schedulers and torchrun, which kill after 30 s; SIGUSR1: of job scripts, ahead of a time limit
DEFAULT = ("SIGTERM", "SIGUSR1")
# Launchers pass a signal on that the scheduler has sent to the ranks too: within these seconds it is the same request.
SAME_REQUEST = 5.0
# seconds that a start, or what follows the last step, has to come to its end
GRACE = 20.0


class Phase(enum.Enum):
    """A part of a run by how a signal is obeyed in it."""

    START = "start"
    STEPS = "steps"
    AFTER = "after"


class LeaveNow(BaseException):
    """Raised in the main thread after the last step by a signal, so that files in the making are removed."""


BeforeLeaving = Callable[[int, str], None]
_watch: "_Watch | None" = None


@contextlib.contextmanager
def watched(
    names: Sequence[str] = DEFAULT,
    before_leaving: BeforeLeaving = lambda code, reason: None,
    hopeless: Callable[[], str | None] = lambda: None,
) -> Iterator[None]:
    """Watch signals inside the block, in the main thread; within another such block, watch these too.

    Args:
        names: of the signals.
        before_leaving: called with the exit code and the reason before the process is ended at once; it has 3 s.
        hopeless: asked after the first signal, every second: why no step can end any more; ``None`` if one can.
    """
    global _watch
    if _watch is not None:
        _watch.add(names)
        yield
        return
    watch = _watch = _Watch(before_leaving, hopeless)
    watch.add(names)
    try:
        yield
    finally:
        _watch = None
        watch.close()


def received() -> str | None:
    """Name of the first signal that this process got; ``None`` without one."""
    return None if _watch is None else _watch.received


def enter(phase: Phase) -> None:
    """Enter a phase of the run.

    Raises:
        LeaveNow: a signal came in before, and in this phase it is obeyed at once.
    """
    if _watch is not None:
        _watch.enter(phase)


class _Watch:
    def __init__(self, before_leaving: BeforeLeaving, hopeless: Callable[[], str | None]):
        self._before_leaving, self._hopeless = before_leaving, hopeless
        self._phase, self._first = Phase.START, 0.0
        self._before: dict[int, Any] = {}
        self.received: str | None = None
        self._interrupted = False
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="exit signals", daemon=True)
        self._thread.start()
        multiprocessing.util.register_after_fork(self, _Watch._in_forked_process)

    def add(self, names: Sequence[str]) -> None:
        """Watch these signals too."""
        for number in (signal.Signals[name] for name in names):
            if number not in self._before:
                self._before[number] = signal.signal(number, self._handle)

    def enter(self, phase: Phase) -> None:
        """Enter a phase; see :func:`enter`."""
        self._phase = phase
        if phase is Phase.AFTER and self.received is not None:
            self._interrupt()

    def close(self) -> None:
        """Give every signal back the handler that it had."""
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.write(self._pipe[1], b"\0")
        self._thread.join()
        for end in self._pipe:
            os.close(end)

    def _in_forked_process(self) -> None:
        """Ignore the signals in a process that ``multiprocessing`` forked: it writes for this one, and ends with it."""
        global _watch
        _watch = None
        signal.set_wakeup_fd(-1)
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # the thread may have noted this signal already
        self._note(number)
        if self._phase is Phase.AFTER and not self._interrupted:
            self._interrupt()

    def _interrupt(self) -> NoReturn:
        self._interrupted = True
        raise LeaveNow

    def _note(self, number: int) -> None:
        if self.received is None:
            self._first, self.received = time.monotonic(), signal.Signals(number).name

    def _listen(self) -> None:
        while True:
            ready, _, _ = select.select([self._pipe[0]], [], [], None if self.received is None else 1.0)
            numbers = os.read(self._pipe[0], 64) if ready else b""
            if 0 in numbers:
                return
            for number in (number for number in numbers if number in self._before):
                if self.received is not None and time.monotonic() - self._first > SAME_REQUEST:
                    self._leave(LEFT, f"a second signal, {signal.Signals(number).name}: left at once")
                self._note(number)
            if self.received is None:
                continue
            if (reason := self._hopeless()) is not None:
                self._leave(FAILED, reason)
            if self._phase is not Phase.STEPS and time.monotonic() - self._first > GRACE:
                when = "before the first step" if self._phase is Phase.START else "after the last step"
                self._leave(LEFT, f"{self.received} {when}")

    def _leave(self, code: int, reason: str) -> NoReturn:
        """End the process, whatever its main thread does, and also where the disk or a pipe does not answer."""
        telling = threading.Thread(target=self._before_leaving, args=(code, reason), daemon=True)
        telling.start()
        telling.join(3)
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(code)
