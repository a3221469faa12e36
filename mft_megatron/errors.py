"""The exception for errors that the user can correct, and how a command reports it."""

import os
import sys
import time
from collections.abc import Callable

# Seconds that a silent rank leaves the rank that prints the error.
PATIENCE = 5


class InputError(Exception):
    """Bad input or a bad option: one line that says what is wrong, where (``file:line`` or option) and what to do.

    Attributes:
        always: every process that raises it prints it, because others may not raise it; otherwise one rank prints for
            all.
    """

    def __init__(self, message: str, always: bool = False):
        super().__init__(message)
        self.always = always


def run_command(main: Callable[[], int | None], quiet: bool = False) -> int:
    """Run a command-line entry; print an :class:`InputError` as one line on stderr.

    Args:
        main: the command's body; returns its exit code (``None`` means 0).
        quiet: do not print an error that other processes raise, too; set on all ranks of a machine but one.

    Returns:
        the exit code: the result of ``main``; 2 after an :class:`InputError` or a file that cannot be read or written;
        130 after an interrupt; 141 if the reader of the output has gone.
    """
    try:
        return main() or 0
    except InputError as error:
        if not quiet or error.always:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        else:
            # torchrun ends all ranks as soon as one exits: the rank that prints the reason must be first.
            time.sleep(PATIENCE)
        return 2
    except BrokenPipeError:
        # The reader, such as head, has closed the pipe: prevent a second error when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        if not quiet:
            print("interrupted; the same command goes on from what is complete", file=sys.stderr, flush=True)
        return 130
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}; nothing was completed there", file=sys.stderr, flush=True)
        return 2
