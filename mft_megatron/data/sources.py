"""Task files: which there are, and their lines in chunks."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from mft_megatron.data.encoding import Chunk
from mft_megatron.data.ledger import SourceFile
from mft_megatron.errors import InputError

SUFFIX = ".jsonl"
CHUNK_BYTES = 1 << 20


def parse_tasks(options: tuple[str, ...]) -> dict[str, list[Path]]:
    """``NAME=PATH`` options as task names and their files; a folder stands for its ``.jsonl`` files, sorted by name.

    Raises:
        InputError: a malformed option, a name given twice, a path that does not exist, a folder without such files.
    """
    tasks: dict[str, list[Path]] = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals or not name or not text:
            raise InputError(f"--task {option}: give NAME=PATH")
        if name in tasks:
            raise InputError(f"--task {option}: task {name} is given twice; put its files into one folder")
        path = Path(text)
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix == SUFFIX)
            if not files:
                raise InputError(f"--task {option}: the folder has no {SUFFIX} file")
        elif path.is_file():
            files = [path]
        else:
            raise InputError(f"--task {option}: no such file or folder")
        tasks[name] = files
    return tasks


class SourceReader:
    """Reads one file in chunks, and knows what it has read at the end."""

    def __init__(self, path: Path):
        self._path = path
        self._digest = hashlib.sha256()
        self._size = self._lines = 0

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
        """The file's lines, about ``chunk_bytes`` at a time."""
        lines: list[bytes] = []
        pending = 0
        with open(self._path, "rb") as file:
            for line in file:
                self._digest.update(line)
                self._size += len(line)
                self._lines += 1
                lines.append(line)
                pending += len(line)
                if pending >= chunk_bytes:
                    yield Chunk(str(self._path), self._lines - len(lines) + 1, lines)
                    lines, pending = [], 0
        if lines:
            yield Chunk(str(self._path), self._lines - len(lines) + 1, lines)

    def entry(self) -> SourceFile:
        """What was read, for the ledger; after the last chunk."""
        return SourceFile(str(self._path), self._size, self._lines, self._digest.hexdigest())
