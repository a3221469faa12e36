"""When Python collects garbage, for ``--manual-gc``: at the same steps on all ranks, so that none waits for another."""

import contextlib
import gc
from collections.abc import Iterator

from mft_megatron.arguments.groups.training import TrainingArguments


class GarbageCollection:
    """Within ``with`` nothing is collected but here; does nothing without ``--manual-gc``."""

    def __init__(self, training: TrainingArguments):
        self._manual, self._interval, self._eval = (
            training.manual_gc,
            training.manual_gc_interval,
            training.manual_gc_eval,
        )

    def __enter__(self) -> "GarbageCollection":
        if self._manual:
            gc.disable()
            gc.collect()
        return self

    def __exit__(self, *error) -> None:
        if self._manual:
            gc.enable()

    def after_step(self, step: int) -> None:
        if self._manual and self._interval and step % self._interval == 0:
            gc.collect()

    @contextlib.contextmanager
    def around_evaluation(self) -> Iterator[None]:
        """Collects all before, and what an evaluation leaves, young, after it: as Megatron does."""
        if self._manual and self._eval:
            gc.collect()
        yield
        if self._manual and self._eval:
            gc.collect(generation=0)
