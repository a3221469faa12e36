"""The one exception that means "the user can mend this"."""

import sys
from collections.abc import Callable


class InputError(Exception):
    """Bad input or a bad option: one line that says what, where (``file:line`` or argument) and what to do."""


def run_command(main: Callable[[], int | None], quiet: bool = False) -> int:
    """Run a command-line entry; print an :class:`InputError` as one line on stderr.

    Args:
        main: the command's body; returns its exit code (``None`` means 0).
        quiet: keep silent about the error; set on all ranks but one, so that it is printed once.

    Returns:
        the exit code: ``main``'s own, or 2 after an :class:`InputError`.
    """
    try:
        return main() or 0
    except InputError as error:
        if not quiet:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
