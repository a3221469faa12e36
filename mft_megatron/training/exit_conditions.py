"""Exit conditions: an interval, a time or a signal that saves and ends a run before its last step, on every rank."""

import contextlib
import time
from types import TracebackType

import psutil

from mft_megatron import exit_signals
from mft_megatron.arguments.table import Arguments
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.trainer import StepReport, Trainer

# begins the reasons of exits that leave little time
_SIGNAL = "a rank got "


class ExitConditions:
    """The exit conditions of the options; within ``with``, signals are watched where the run saves checkpoints."""

    def __init__(self, arguments: Arguments):
        training = arguments.training
        self._interval, self._minutes = training.exit_interval, training.exit_duration_in_mins
        self._signals = list(exit_signals.DEFAULT) if arguments.checkpoint.save is not None else []
        if training.exit_signal_handler:
            self._signals.append(training.exit_signal)
        self._asks = bool(self._signals) or self._minutes is not None
        self._hurried = False

    def __enter__(self) -> "ExitConditions":
        self._watching = contextlib.ExitStack()
        if self._signals:
            self._watching.enter_context(exit_signals.watched(self._signals))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watching.close()

    def begin(self, trainer: Trainer) -> str | None:
        """Let the sums of each step tell all ranks whether one is to leave; returns :meth:`reason` before the first."""
        if not self._asks:
            return None
        exit_signals.enter(exit_signals.Phase.STEPS)
        trainer.leave_requested = lambda: self._own_reason() is not None
        trainer.interrupt_requested = lambda: exit_signals.received() is not None
        return self._reason_of_any_rank() if process_groups.any_rank(exit_signals.received() is not None) else None

    def reason(self, step: int, report: StepReport | None) -> str | None:
        """The option or signal that ends the run after ``step``; ``None`` while it continues.

        One rank's clock or signal counts for all: its request is in the sums of the step's report.
        """
        if self._interval is not None and step % self._interval == 0:
            return f"--exit-interval {self._interval}"
        if not self._asks or report is None or not report.leave_requested():
            return None
        return self._reason_of_any_rank()

    def interrupted(self) -> str | None:
        """The signal that has interrupted an evaluation; a collective of all ranks."""
        return self._reason_of_any_rank()

    @property
    def hurried(self) -> bool:
        """Whether the reason is a signal, which leaves little time; the same on all ranks."""
        return self._hurried

    def _reason_of_any_rank(self) -> str | None:
        reasons = [reason for reason in process_groups.of_all_ranks(self._own_reason()) if reason is not None]
        signals = [reason for reason in reasons if reason.startswith(_SIGNAL)]
        self._hurried = bool(signals)
        return next(iter([*signals, *reasons]), None)

    def _own_reason(self) -> str | None:
        name = exit_signals.received()
        if name is not None:
            return f"{_SIGNAL}{name}"
        if self._minutes is not None and minutes_since_start() > self._minutes:
            return f"--exit-duration-in-mins {self._minutes:g}"
        return None


def minutes_since_start() -> float:
    """Minutes since this process started."""
    return (time.time() - psutil.Process().create_time()) / 60
