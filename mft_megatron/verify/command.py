"""The command line of ``tools/verify.py``."""

from collections.abc import Callable, Mapping, Sequence

from mft_megatron.errors import InputError

from .objective.command import objective
from .packs.command import packs

# by name what it shows, and a function from the words after the name to the exit code: 0 where it is given, else 1
CERTIFICATES: Mapping[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "objective": ("loss, shares and gradients of a run on its parallel layout are those of Eq. 1", objective),
    "packs": ("samples that share a row do not see each other", packs),
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
        print(f"usage: verify.py {{{','.join(CERTIFICATES)}}} [options]\n\nEach certificate has its own --help:")
        for name, (shows, _) in CERTIFICATES.items():
            print(f"  {name:<11}{shows}")
        return 0
    if word not in CERTIFICATES:
        raise InputError(f"unknown certificate {word!r}; give one of: {', '.join(CERTIFICATES)}")
    return CERTIFICATES[word][1](command_line[1:])
