"""The end of a start of a run: its exit code, and its record in ``outcome.json``. Needs no torch."""

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Iterator

from mft_megatron import exit_signals, progress_marks
from mft_megatron.errors import InputError, exit_code, in_a_line
from mft_megatron.exit_codes import FINISHED, LEFT
from mft_megatron.run_folder.outcome import began_here, record_outcome
from mft_megatron.run_folder.owner.owner import in_use

from . import peers


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
            reason = str(error) if isinstance(error, InputError) else in_a_line(error)
            record_outcome(folder, code, reason, progress_marks.position().step)
        raise


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
        record_outcome(folder, code, reason, progress_marks.position().step)
        if main_rank:
            print(f"{reason}; nothing more is saved", file=sys.stderr, flush=True)

    hopeless = functools.partial(peers.lost, folder, os.environ)
    with errors_recorded(folder, main_rank), exit_signals.watched(exit_signals.DEFAULT, tell, hopeless):
        yield


def left_before_the_export(ending: Ending) -> Ending:
    """The ending of a run that a signal ended before the exports of its checkpoints were complete."""
    left = ending.left or "a signal during the export; the training is complete"
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
