"""The end of a start of a run: its exit code, and its record in ``outcome.json``. Needs no torch."""

import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Iterator

from mft_megatron import exit_signals, progress_marks
from mft_megatron.errors import InputError, exit_code, in_a_line
from mft_megatron.exit_codes import FINISHED, LEFT
from mft_megatron.run_folder.outcome import LOST_RANK, began_here, record_outcome, record_running
from mft_megatron.run_folder.owner.owner import in_use

from . import peers

# words in errors of collectives whose other side is gone, of gloo and NCCL
_OF_LOST_RANKS = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
    *("remote process exited", "failed to recv", "Connection refused"),
)
# phases of progress_marks after the update of a step
_AFTER_STEPS = ("after the step", "evaluation", "save", "save in the background")
_MINUTE = 60.0


@dataclasses.dataclass(frozen=True)
class Ending:
    """How training ended without an error.

    Attributes:
        step: optimizer steps of the run.
        left: why it was saved and left before its last step; ``None`` if the run is finished.
        hurried: whether a signal asked for that, so that little time is left.
    """

    step: int
    left: str | None = None
    hurried: bool = False


@contextlib.contextmanager
def errors_recorded(folder: str, main_rank: bool) -> Iterator[None]:
    """Record an error that ends the block as the outcome of the run in ``folder``, and raise it again.

    Args:
        folder: the run folder.
        main_rank: whether this process records what all ranks raise.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        code = exit_code(error)
        shared = isinstance(error, (InputError, KeyboardInterrupt)) and not getattr(error, "always", False)
        # An error before this start owns the folder may be in a command line beside a run that goes on.
        mine = began_here(folder) or not in_use(folder)
        if mine and (main_rank or not shared):
            record_outcome(folder, code, _reason(error), completed_steps())
        raise


def _reason(error: BaseException) -> str:
    if isinstance(error, InputError):
        return str(error)
    reason = in_a_line(error)
    return f"{LOST_RANK}: {reason}" if any(words in reason for words in _OF_LOST_RANKS) else reason


def completed_steps() -> int | None:
    """Optimizer steps of the run that this process has completed; ``None`` before its first one."""
    position = progress_marks.position()
    if position.step is None:
        return None
    return position.step if position.mark.phase in _AFTER_STEPS else position.step - 1


class RunningRecord:
    """The record that the run is running, and how far it has come, on rank 0 of a run with a folder."""

    def __init__(self, folder: str | None):
        self._folder, self._written = folder, time.monotonic()

    def after_step(self, step: int) -> None:
        """Renew the record after ``step`` if it is a minute old."""
        now = time.monotonic()
        if self._folder is not None and now - self._written > _MINUTE:
            self._written = now
            record_running(self._folder, step, quiet=True)


@contextlib.contextmanager
def supervised(folder: str | None, main_rank: bool) -> Iterator[None]:
    """Watch the signals that ask a run to save and leave, and record errors that end the block.

    Args:
        folder: the run folder; without one nothing is saved, and signals end the process as ever.
        main_rank: whether this process speaks for all ranks.
    """
    if folder is None:
        yield
        return

    def tell(code: int, reason: str) -> None:
        record_outcome(folder, code, reason, completed_steps())
        if main_rank:
            print(f"{reason}; nothing more is saved", file=sys.stderr, flush=True)

    hopeless = functools.partial(peers.lost, folder, os.environ)
    with errors_recorded(folder, main_rank), exit_signals.watched(exit_signals.DEFAULT, tell, hopeless):
        yield


def left_before_the_export(ending: Ending) -> Ending:
    """Say, and return, that a signal ended a run before the exports of its checkpoints were complete; on rank 0."""
    left = ending.left or "a signal during the export; the training is complete"
    print(f"--save-hf: a signal came before the export at step {ending.step}; the next start makes it", flush=True)
    return dataclasses.replace(ending, left=left, hurried=True)


def exit_code_of(ending: Ending, folder: str | None, main_rank: bool) -> int:
    """Record an ending in the run folder, if there is one, and return the exit code of this rank.

    A run that was left has the code 0 under torchrun, which would start it again.
    """
    if folder is None:
        return FINISHED
    code, reason = (FINISHED, "the run is complete") if ending.left is None else (LEFT, ending.left)
    if main_rank:
        record_outcome(folder, code, reason, ending.step)
    return FINISHED if "TORCHELASTIC_RUN_ID" in os.environ else code
