"""Why a run is to be saved and left before its last step: an interval, its time, a signal. The same on every rank."""

import signal
import time

import psutil

from mft_megatron.arguments.groups.training import TrainingArguments
from mft_megatron.mcore.parallel import process_groups


class ExitConditions:
    """Asked after each step. Within ``with`` it catches ``--exit-signal``, if it is to."""

    def __init__(self, training: TrainingArguments):
        self._training = training
        self._caught = False
        self._before = None

    def __enter__(self) -> "ExitConditions":
        if self._training.exit_signal_handler:
            self._before = signal.signal(signal.Signals[self._training.exit_signal], self._catch)
        return self

    def __exit__(self, *error) -> None:
        if self._training.exit_signal_handler:
            signal.signal(signal.Signals[self._training.exit_signal], self._before or signal.SIG_DFL)

    def _catch(self, number: int, frame: object) -> None:
        self._caught = True

    def reason(self, step: int) -> str | None:
        """The option by which the run ends after ``step``; ``None`` where it goes on.

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
    """Of this process."""
    return (time.time() - psutil.Process().create_time()) / 60
