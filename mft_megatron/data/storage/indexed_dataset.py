"""Megatron's IndexedDataset on disk (MMIDIDX, version 1), written as a stream and read through a memory map.

``NAME.bin``: the items of all sequences, one after the other. ``NAME.idx``, little-endian::

    9 bytes     "MMIDIDX\\0\\0"
    uint64      version, 1
    uint8       type of an item: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 6 float64, 7 float32, 8 uint16
    uint64      n, number of sequences
    uint64      d, number of document marks
    int32 [n]   items of each sequence
    int64 [n]   byte offset of each sequence in NAME.bin
    int64 [d]   index of the sequence at which each document starts, and n at the end

Here a sample is one sequence and one document, so the marks are 0 … n.
"""

import functools
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mft_megatron.errors import InputError

from .mapped_files import watched

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
# type code in the index → dtype of an item
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name) for code, name in enumerate(("u1", "i1", "i2", "i4", "i8", "f8", "f4", "u2"), start=1)
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_HEADER = struct.Struct("<9sQBQQ")


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest dtype that Megatron uses for ids below ``vocab_size``: uint16 or int32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)


class IndexedDatasetWriter:
    """Appends sequences to ``bin_path``; :meth:`finish` writes ``idx_path``."""

    def __init__(self, bin_path: Path, idx_path: Path, dtype: np.dtype | type[np.generic]):
        """Open the file of items.

        Args:
            bin_path: file of items.
            idx_path: file of the index.
            dtype: of the items, one of :data:`DTYPES`.
        """
        self.bin_path, self.idx_path = bin_path, idx_path
        self._bin = open(bin_path, "wb")  # noqa: SIM115  (closed by close)
        self._dtype = np.dtype(dtype)
        self._lengths = array("i")

    def add(self, items: np.ndarray, lengths: np.ndarray) -> None:
        """Append concatenated sequences.

        Args:
            items: [items], cast to the writer's dtype.
            lengths: int [sequences], items of each sequence.

        Raises:
            ValueError: the lengths do not add up to the number of items.
        """
        if int(lengths.sum()) != len(items):
            raise ValueError(f"{len(items)} items for lengths that add up to {int(lengths.sum())}")
        self._bin.write(np.ascontiguousarray(items, self._dtype).tobytes())
        self._lengths.extend(lengths.tolist())

    def written(self, at_once: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Read back the sequences that have been appended, ``at_once`` at a time: items, and lengths as int32."""
        self._bin.flush()
        lengths = np.array(self._lengths, np.int32)
        with open(self.bin_path, "rb") as file:
            for first in range(0, len(lengths), at_once):
                block = lengths[first : first + at_once]
                yield np.fromfile(file, self._dtype, int(block.sum(dtype=np.int64))), block

    def finish(self) -> None:
        """Write the index, which completes the data set."""
        self.close()
        lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.empty(0, np.int32)
        offsets = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1], out=offsets[1:])
        with open(self.idx_path, "wb") as idx:
            idx.write(_HEADER.pack(MAGIC, VERSION, CODES[self._dtype], len(lengths), len(lengths) + 1))
            for part in (lengths, offsets * self._dtype.itemsize, np.arange(len(lengths) + 1, dtype=np.int64)):
                idx.write(part.tobytes())

    def close(self) -> None:
        """Close the file of items."""
        self._bin.close()


class IndexedDataset:
    """A memory-mapped data set.

    Attributes:
        items: memory map of the items of all sequences, concatenated.
        lengths: int32 [n], items of each sequence; :meth:`start_of` returns its first index in ``items``.
    """

    items: np.ndarray
    lengths: np.ndarray

    def __init__(self, prefix: str | Path = "", bin_path: Path | None = None, idx_path: Path | None = None):
        """Open ``prefix.bin`` and ``prefix.idx``, or ``bin_path`` and ``idx_path``.

        Raises:
            InputError: a file is missing, the index is not a supported MMIDIDX, or a size differs from the header or
                index.
        """
        idx_path, bin_path = idx_path or Path(f"{prefix}.idx"), bin_path or Path(f"{prefix}.bin")
        for path in (idx_path, bin_path):
            if not path.is_file():
                raise InputError(f"{path}: missing; preprocess the data again")
        size = idx_path.stat().st_size
        with open(idx_path, "rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(MAGIC):
            raise InputError(f"{idx_path}: not an MMIDIDX index")
        _, version, code, n, marks = _HEADER.unpack(header)
        if version != VERSION or code not in DTYPES:
            raise InputError(f"{idx_path}: version {version}, item type {code}: not supported (version {VERSION} is)")
        expected = _HEADER.size + 4 * n + 8 * n + 8 * marks
        if size != expected:
            raise InputError(f"{idx_path}: {size} bytes, an index of {n} sequences has {expected}; the file is damaged")
        self._marks = (idx_path, _HEADER.size + 12 * n, marks)
        dtype = DTYPES[code]
        self.lengths, pointers = np.empty(0, np.int32), np.empty(0, np.uint8)
        if n:
            self.lengths = watched(np.memmap(idx_path, np.int32, "r", _HEADER.size, (n,)), idx_path)
            pointers = watched(np.memmap(idx_path, np.uint8, "r", _HEADER.size + 4 * n, (8 * n,)), idx_path)
        self._pointers = pointers.view(np.int64)  # bytes; not aligned to 8 in the file, which numpy accepts
        self._item_size = dtype.itemsize
        items = int(self.start_of(n - 1)) + int(self.lengths[-1]) if n else 0
        if bin_path.stat().st_size != items * dtype.itemsize:
            raise InputError(
                f"{bin_path}: {bin_path.stat().st_size} bytes, its index says {items * dtype.itemsize}; preprocess the "
                "data again"
            )
        self.items = watched(np.memmap(bin_path, dtype, "r"), bin_path) if items else np.empty(0, dtype)

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """Document marks, int64 [documents + 1]: first sequence of each document, and the number of sequences."""
        path, offset, marks = self._marks
        return np.fromfile(path, np.uint8, 8 * marks, offset=offset).view(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def start_of(self, sequences: int | slice | np.ndarray) -> np.ndarray:
        """Index of the first item of sequences, int64; only their part of the index is read from the disk.

        Args:
            sequences: one index, a slice, or int64 [k].

        Returns:
            int64, a scalar or [k].
        """
        return self._pointers[sequences] // self._item_size

    def read(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Read the sequences ``first`` … ``last - 1``, those of them that there are.

        Returns:
            items: of all these sequences concatenated.
            lengths: int32 [sequences].
        """
        lengths = np.asarray(self.lengths[first:last])
        start = int(self.start_of(first))
        return np.asarray(self.items[start : start + int(lengths.sum(dtype=np.int64))]), lengths

    def __getitem__(self, sequence: int) -> np.ndarray:
        """Items of one sequence, a view."""
        start = int(self.start_of(sequence))
        return self.items[start : start + int(self.lengths[sequence])]
