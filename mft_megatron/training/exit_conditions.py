"""Exit conditions: an interval, a time or a signal that saves and ends a run before its last step, on every rank."""

import signal
import time
from types import FrameType, TracebackType

import psutil

from mft_megatron.arguments.groups.training import TrainingArguments
from mft_megatron.mcore.parallel import process_groups


class ExitConditions:
    """The exit conditions of the options; within ``with``, ``--exit-signal`` is caught if it is one of them."""

    def __init__(self, training: TrainingArguments):
        self._training = training
        self._caught = False

    def __enter__(self) -> "ExitConditions":
        if self._training.exit_signal_handler:
            self._handler_before = signal.signal(signal.Signals[self._training.exit_signal], self._catch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._training.exit_signal_handler:
            signal.signal(signal.Signals[self._training.exit_signal], self._handler_before or signal.SIG_DFL)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._caught = True

    def reason(self, step: int) -> str | None:
        """The option that ends the run after ``step``; ``None`` while it continues.

        A collective, unless the step alone decides: one rank's clock or signal counts for all.
        """
        training = self._training
        if training.exit_interval is not None and step % training.exit_interval == 0:
            return f"--exit-interval {training.exit_interval}"
        if training.exit_signal_handler and process_groups.any_rank(self._caught):
            return f"--exit-signal-handler: a rank got {training.exit_signal}"
        limit = training.exit_duration_in_mins
        if limit is not None and process_groups.any_rank(minutes_since_start() > limit):
            return f"--exit-duration-in-mins {limit:g}"
        return None


def minutes_since_start() -> float:
    """Minutes since this process started."""
    return (time.time() - psutil.Process().create_time()) / 60
