"""The exception for errors that the user can correct, and how a command reports it."""

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mft_megatron.disk_errors import FULL, OF_FILES, disk_error, explain, failure, named_file
from mft_megatron.exit_codes import BAD_INPUT, FAILED, INTERRUPTED, READER_GONE

# Seconds that a silent rank leaves the rank that prints the error.
PATIENCE = 5


class InputError(Exception):
    """Bad input or a bad option: one line that says what is wrong, where (``file:line`` or option) and what to do.

    Attributes:
        always: every process that raises it prints it, because others may not raise it; otherwise one rank prints for
            all.
        code: exit code of the command, a value of :mod:`.exit_codes`.
    """

    def __init__(self, message: str, always: bool = False, code: int = BAD_INPUT):
        super().__init__(message)
        self.always = always
        self.code = code


@contextlib.contextmanager
def disk_reported(place: Path, consequence: str, remedy: str, always: bool = False) -> Iterator[None]:
    """Turn a disk that is full or cannot be used, inside the block, into a one-line error.

    The remedy is left out where the error names a file outside the place, such as one that is read there.

    Args:
        place: what is written: a folder, or a file for errors that name none.
        consequence: what became of it, in words that follow "the disk is full; ".
        remedy: what to do, in words that follow "free some space, or ".
        always: as in :class:`InputError`.

    Raises:
        InputError: there was such an error; other errors stay as they are.
    """
    try:
        yield
    except OSError as error:
        disk = disk_error(error)
        if disk is None:
            raise
        remedies = [
            *(["free some space"] if disk.errno in FULL else []),
            *([remedy] if _concerns(disk, place) else []),
        ]
        advice = ", or ".join(remedies)
        line = failure(disk, place, consequence) + (f". {advice[0].upper()}{advice[1:]}" if advice else "")
        raise InputError(line, always) from None


def in_a_line(error: BaseException) -> str:
    """Class and first line of an error of other software, to be quoted in a line."""
    first = (str(error).strip() or "no message").splitlines()[0][:300]
    return f"{type(error).__name__}: {first}"


def _concerns(error: OSError, place: Path) -> bool:
    """Whether an error may be about a place: it names no file, or one in the place or above it."""
    name = named_file(error)
    if name is None:
        return True
    file, folder = Path(os.path.abspath(name)), Path(os.path.abspath(place))
    return file.is_relative_to(folder) or folder.is_relative_to(file)


def exit_code(error: BaseException) -> int:
    """The exit code, of :mod:`.exit_codes`, of a command that an error ends."""
    if isinstance(error, InputError):
        return error.code
    if isinstance(error, BrokenPipeError):
        return READER_GONE
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, OSError):
        error = disk_error(error) or error
        return FAILED if error.filename is None and error.errno not in OF_FILES else BAD_INPUT
    return FAILED


def run_command(main: Callable[[], int | None], quiet: bool = False) -> int:
    """Run a command-line entry; print an :class:`InputError` as one line on stderr.

    Args:
        main: the command's body; returns its exit code (``None`` means 0).
        quiet: do not print an error that other processes raise, too; set on all ranks of a machine but one.

    Returns:
        the exit code, of :mod:`.exit_codes`: the result of ``main``, or that of an :class:`InputError`; BAD_INPUT after
        a file, or the output, that cannot be read or written; INTERRUPTED; READER_GONE.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # text of the user's data, which a terminal may be unable to show, must not end a command
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main() or _finish_output()
    except InputError as error:
        if not quiet or error.always:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        else:
            # torchrun ends all ranks as soon as one exits: the rank that prints the reason must be first.
            time.sleep(PATIENCE)
        return error.code
    except BrokenPipeError:
        # The reader, such as head, has closed the pipe: prevent a second error when Python flushes at exit.
        _drop_output()
        return READER_GONE
    except KeyboardInterrupt:
        if not quiet:
            print("interrupted; the same command goes on from what is complete", file=sys.stderr, flush=True)
        return INTERRUPTED
    except OSError as error:
        code = exit_code(error)
        if code == FAILED:
            raise
        line = failure(
            disk_error(error) or error, "the output, or a file without a name", "nothing was completed there"
        )
        print(f"error: {line}", file=sys.stderr, flush=True)
        _finish_output()
        return code


def _finish_output() -> int:
    """Flush the output, which at Python's exit would be a traceback where the disk is full; returns the exit code."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"error: the output cannot be written: {explain(error, '.')}", file=sys.stderr, flush=True)
        _drop_output()
        return BAD_INPUT
    return 0


def _drop_output() -> None:
    """Send what Python flushes at its exit nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
