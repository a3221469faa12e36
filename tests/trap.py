"""A pickle that executes code when it is loaded, in a way that a test can see."""

from pathlib import Path


class Trap:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, file: Path):
        self._file = file

    def __reduce__(self):
        return Path.touch, (self._file,)
