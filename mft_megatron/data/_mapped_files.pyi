"""Memory maps of files that become unreadable while they are read; the contracts are in csrc/mapped_files.hpp."""

def watch(start: int, length: int, file_size: int, path: str) -> int:
    """Watch the pages of a map: name the file when they cannot be read.

    Args:
        start: address of the first mapped byte.
        length: bytes that are mapped, at least one.
        file_size: bytes of the file.
        path: of the file.

    Returns:
        a number for :func:`release`.
    """

def release(number: int) -> None:
    """End the watch of a file; ``number`` as :func:`watch` returned it."""

def enter_guard() -> None:
    """Begin a guarded block of this thread: pages that cannot be read are zeros until it ends."""

def leave_guard() -> str:
    """End a guarded block; return the path of a watched file that could not be read, or an empty text."""
