"""Calls that may never return, as to a file system that hangs, made in a thread that may be left behind."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Errand(Generic[T]):
    """One call: its result when it has returned, ``None`` if it raised an error."""

    def __init__(self, call: Callable[[], T]):
        self._call = call
        self.over = threading.Event()
        self.result: T | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.result = self._call()
        except Exception as error:
            self.error = error
        self.over.set()


class Errands:
    """A thread that makes calls for another thread, which waits no longer than it wants to.

    Attributes:
        error: the newest error of a call; ``None`` without one.
    """

    def __init__(self, name: str):
        """Start the thread; ``name`` is for reports."""
        self._waiting: queue.SimpleQueue[_Errand[Any] | None] = queue.SimpleQueue()
        self._newest: _Errand[Any] | None = None
        # whether the newest call has taken longer than its caller wanted to wait
        self._late = False
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def run(self, call: Callable[[], T], patience: float) -> T | None:
        """Make a call.

        Args:
            call: raises whatever it likes.
            patience: seconds to wait for its end, and for that of a call before it; 0 to go on at once.

        Returns:
            its result; ``None`` if it failed or has not returned in time. While it hangs no other call is made.
        """
        end = time.monotonic() + patience
        if self._newest is not None and not self._newest.over.wait(0 if self._late else patience):
            return None
        errand = _Errand(call)
        self._newest = errand
        self._waiting.put(errand)
        self._late = not errand.over.wait(max(end - time.monotonic(), 0)) and patience > 0
        if not errand.over.is_set():
            return None
        self.error = errand.error
        return errand.result

    def close(self, patience: float) -> None:
        """End the thread, waiting for a call no longer than ``patience`` seconds."""
        self._waiting.put(None)
        self._thread.join(patience)

    def _work(self) -> None:
        while (errand := self._waiting.get()) is not None:
            errand.run()
