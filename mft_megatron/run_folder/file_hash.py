"""Size and hashes of a file, computed while its bytes are written or read.

A file is hashed in pieces of 16 MiB, so that the ranks of a run can check parts of one file, and a few pieces of a very
large one. XXH3 finds damage by accident, at the speed of memory; it is no protection against forgery.
"""

import dataclasses
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

PIECE_BYTES = 16 * 2**20
# bytes that are hashed and written, or read and hashed, while they are in the processor's cache
_BLOCK_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class FileHash:
    """Size and hashes of a file.

    Attributes:
        size: in bytes.
        pieces: XXH3 of each 16 MiB, 128 bits in hex; the last piece may be shorter, an empty file has none.
    """

    size: int
    pieces: tuple[str, ...]

    def piece(self, number: int) -> slice:
        """The bytes of a piece."""
        return slice(number * PIECE_BYTES, min(self.size, (number + 1) * PIECE_BYTES))


class Hasher:
    """Hashes bytes that are given one block after the other."""

    def __init__(self) -> None:
        self._size = 0
        self._pieces: list[str] = []
        self._piece = xxhash.xxh3_128()

    def update(self, data: bytes | memoryview) -> None:
        """Add bytes."""
        rest = memoryview(data).cast("B")
        while len(rest):
            room = PIECE_BYTES - self._size % PIECE_BYTES
            self._piece.update(rest[:room])
            self._size += min(room, len(rest))
            if len(rest) >= room:
                self._end_piece()
            rest = rest[room:]

    def result(self) -> FileHash:
        """Size and hashes of all bytes; none can be added afterwards."""
        if self._size % PIECE_BYTES:
            self._end_piece()
        return FileHash(self._size, tuple(self._pieces))

    def _end_piece(self) -> None:
        self._pieces.append(self._piece.hexdigest())
        self._piece = xxhash.xxh3_128()


class HashedFile(io.FileIO):
    """A new file that is written from its beginning to its end and hashed on the way.

    :func:`create_hashed` gives one with a buffer.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Create the file.

        Raises:
            FileExistsError: there is one.
        """
        super().__init__(os.fspath(path), "xb")
        self._hasher = Hasher()

    def write(self, data: Any) -> int:
        """Write some of the bytes and return how many; a buffer writes the others afterwards."""
        block = memoryview(data).cast("B")[:_BLOCK_BYTES]
        written = super().write(block)
        self._hasher.update(block[:written])
        return written

    def seek(self, position: int, whence: int = 0) -> int:
        """Refuse to write elsewhere than at the end."""
        raise io.UnsupportedOperation("a file that is hashed while it is written has no other positions")

    def truncate(self, size: int | None = None) -> int:
        """Refuse to take written bytes back."""
        raise io.UnsupportedOperation("a file that is hashed while it is written cannot be cut off")

    def result(self) -> FileHash:
        """Size and hashes of what has been written; call it when the buffer is flushed or closed."""
        return self._hasher.result()


def create_hashed(path: str | os.PathLike[str]) -> tuple[io.BufferedWriter, HashedFile]:
    """Create a file that is hashed while it is written.

    Returns:
        the file to write to, and the one that has the hashes when the first is closed.
    """
    file = HashedFile(path)
    return io.BufferedWriter(file, _BLOCK_BYTES), file


def write_hashed(path: Path, content: bytes | memoryview) -> FileHash:
    """Write a file, with a copy on the disk when this returns.

    Raises:
        OSError: it cannot be written.
    """
    stream, file = create_hashed(path)
    with stream:
        stream.write(content)
        stream.flush()
        os.fsync(file.fileno())
    return file.result()


def hash_file(path: Path) -> FileHash:
    """Hash a file that exists.

    Raises:
        OSError: it cannot be read.
    """
    hasher = Hasher()
    for block in read_blocks(path):
        hasher.update(block)
    return hasher.result()


def read_blocks(path: Path, part: slice = slice(0, None)) -> Iterator[memoryview]:
    """The bytes of a file, or of a part of it, block by block; each is overwritten by the next.

    Raises:
        OSError: it cannot be read.
    """
    block = memoryview(bytearray(_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as stream:
        stream.seek(part.start)
        left = part.stop - part.start if part.stop is not None else None
        while left is None or left > 0:
            read = stream.readinto(block if left is None else block[: min(left, _BLOCK_BYTES)])
            if not read:
                return
            yield block[:read]
            left = left if left is None else left - read


def digest(content: bytes) -> str:
    """XXH3 of bytes in memory, 128 bits in hex."""
    return xxhash.xxh3_128(content).hexdigest()
