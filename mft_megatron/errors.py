"""The one exception that means "the user can mend this"."""

import os
import sys
import time
from collections.abc import Callable

# seconds that a silent rank gives the one that speaks
PATIENCE = 5


class InputError(Exception):
    """Bad input or a bad option: one line that says what, where (``file:line`` or argument) and what to do.

    ``always``: to be printed by whatever process meets it, since others may not; else one process speaks for all.
    """

    def __init__(self, message: str, always: bool = False):
        super().__init__(message)
        self.always = always


def run_command(main: Callable[[], int | None], quiet: bool = False) -> int:
    """Run a command-line entry; print an :class:`InputError` as one line on stderr.

    Args:
        main: the command's body; returns its exit code (``None`` means 0).
        quiet: keep silent about an error that other processes meet, too; set on all ranks of a machine but one.

    Returns:
        the exit code: ``main``'s own, 2 after an :class:`InputError` or a file that cannot be read or written, 130
        after an interrupt.
    """
    try:
        return main() or 0
    except InputError as error:
        if not quiet or error.always:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        else:
            # torchrun ends all ranks when the first one has left, and that should be the one that says why
            time.sleep(PATIENCE)
        return 2
    except BrokenPipeError:
        # whoever read the output has seen enough; nothing is left to be flushed at exit
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
