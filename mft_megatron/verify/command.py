"""The command line of ``tools/verify.py``."""

from collections.abc import Callable, Mapping, Sequence

from mft_megatron.errors import InputError

from .objective.command import objective
from .packs.command import packs

# functions from the words after the certificate's name to the exit code: 0 where it is given, 1 where it is not
CERTIFICATES: Mapping[str, Callable[[Sequence[str]], int]] = {
    "objective": objective,
    "packs": packs,
}


def main(command_line: Sequence[str]) -> int:
    """Run the certificate that the first word names.

    Returns:
        the exit code: 0 certified, 1 failed.

    Raises:
        InputError: there is no such certificate, or its input cannot be used.
    """
    word = command_line[0] if command_line else "--help"
    if word in ("-h", "--help"):
        print(f"usage: verify.py {{{','.join(CERTIFICATES)}}} [options]\n\nEach certificate has its own --help.")
        return 0
    if word not in CERTIFICATES:
        raise InputError(f"unknown certificate {word!r}; give one of: {', '.join(CERTIFICATES)}")
    return CERTIFICATES[word](command_line[1:])
