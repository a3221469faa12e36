"""Garbage collection for ``--manual-gc``: at the same steps on all ranks, so that none waits for another."""

import contextlib
import gc
from collections.abc import Iterator
from types import TracebackType

from mft_megatron.arguments.groups.training import TrainingArguments


class GarbageCollection:
    """Python's garbage collection, within ``with`` at these steps only; Python decides without ``--manual-gc``."""

    def __init__(self, training: TrainingArguments):
        self._manual = training.manual_gc
        self._interval = training.manual_gc_interval
        self._around_evaluation = training.manual_gc_eval

    def __enter__(self) -> "GarbageCollection":
        if self._manual:
            gc.disable()
            gc.collect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._manual:
            gc.enable()

    def after_step(self, step: int) -> None:
        """Collect all garbage if ``--manual-gc-interval`` ends with this step."""
        if self._manual and self._interval and step % self._interval == 0:
            gc.collect()

    @contextlib.contextmanager
    def around_evaluation(self) -> Iterator[None]:
        """Collect all garbage before an evaluation, and the youngest generation after it, as Megatron does."""
        if self._manual and self._around_evaluation:
            gc.collect()
        yield
        if self._manual and self._around_evaluation:
            gc.collect(generation=0)
