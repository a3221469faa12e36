"""Safetensors files read and written a piece at a time.

::

    file      8 bytes: length n of the header, little-endian │ n bytes: JSON {name: {dtype, shape, data_offsets}} │ data
    folder    model.safetensors, or model-0000k-of-0000n.safetensors with model.safetensors.index.json

The safetensors library maps files or wants whole shards in memory; here memory is that of the piece at hand.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from mft_megatron.errors import InputError
from mft_megatron.mcore.platform.precisions import BY_DTYPE, PRECISIONS

DTYPES = {precision.safetensors: precision.dtype for precision in PRECISIONS}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100 * 2**20
# what is in memory of a weight at a time
PIECE_BYTES = 128 * 2**20


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a weight is: ``offset``: of its first byte in ``file``."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class WeightFiles:
    """The weights of a Hugging Face folder; every header is read and compared with its file at the start."""

    def __init__(self, folder: Path):
        """
        Raises:
            InputError: no safetensors files there, one is missing, damaged or cut off, or index and files disagree.
        """
        self.folder = folder
        self.weights: dict[str, Stored] = {}
        self._open: dict[Path, BinaryIO] = {}
        index, single = folder / INDEX, folder / SINGLE
        if index.is_file():
            self._read_index(index)
        elif single.is_file():
            self.weights = read_header(single)
        elif any(folder.glob("*.bin")):
            raise InputError(
                f"{folder}: its weights are no safetensors files; load the model with transformers and write it "
                "again with save_pretrained"
            )
        else:
            raise InputError(f"{folder}: has neither {SINGLE} nor {INDEX}; give the folder of a model")

    def read_into(self, rows: Tensor, name: str, first: int) -> None:
        """Fill ``rows``, contiguous and of the weight's dtype, with as many rows of a weight, from ``first`` on.

        Raises:
            InputError: the file is shorter than it was.
        """
        stored = self.weights[name]
        file = self._file(stored.file)
        file.seek(stored.offset + first * stored.row_bytes)
        content = memoryview(rows.view(-1).view(torch.uint8).numpy())
        while content:
            count = file.readinto(content)
            if not count:
                raise InputError(f"{stored.file}: ends within {name}; the file is cut off")
            content = content[count:]

    def read_part(self, part: Tensor, name: str, first: int, column: int) -> None:
        """Like :meth:`read_into`, from ``column`` on, where ``part`` has fewer columns than the weight."""
        stored = self.weights[name]
        if part.shape[1:] == stored.shape[1:]:
            return self.read_into(part, name, first)
        # whole rows would be as many times too much as there are ranks; of a map only what is touched is read
        size = stored.dtype.itemsize
        whole = np.memmap(stored.file, np.uint8, "r", stored.offset, (stored.shape[0], stored.row_bytes))
        columns = whole[first : first + len(part), column * size : (column + part.shape[1]) * size]
        part.view(torch.uint8).numpy()[:] = columns

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _file(self, path: Path) -> BinaryIO:
        if path not in self._open:
            self._open[path] = open(path, "rb", buffering=0)  # noqa: SIM115
        return self._open[path]

    def _read_index(self, index: Path) -> None:
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            names_by_file: dict[str, set[str]] = {}
            for name, file in weight_map.items():
                names_by_file.setdefault(file, set()).add(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: not an index of weights ({error}); download it again") from None
        for file, names in sorted(names_by_file.items()):
            if Path(file).name != file:
                raise InputError(f"{index}: names {file!r}, which is no file of this folder; download it again")
            if not (self.folder / file).is_file():
                raise InputError(f"{index}: names {file}, which is not there; download it")
            found = read_header(self.folder / file)
            if missing := sorted(names - found.keys()):
                raise InputError(f"{self.folder / file}: lacks {missing[0]}, which {INDEX} says is there")
            if extra := sorted(found.keys() - names):
                raise InputError(f"{self.folder / file}: has {extra[0]}, which {INDEX} does not say is there")
            self.weights.update(found)


def read_header(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds, by name.

    Raises:
        InputError: it is no such file, is damaged, or is shorter or longer than it says.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, LONGEST_HEADER):
            raise InputError(f"{path}: cut off, or no safetensors file; download it again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {name: _entry(path, name, content, 8 + length) for name, content in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: its header is damaged ({error}); download it again") from None
    ends = max((content["data_offsets"][1] for content in header.values()), default=0)
    if 8 + length + ends != size:
        raise InputError(f"{path}: {size} bytes, its header says {8 + length + ends}; download it again")
    return entries


def _entry(path: Path, name: str, content: dict[str, Any], data: int) -> Stored:
    shape, (begin, end) = tuple(content["shape"]), content["data_offsets"]
    dtype = DTYPES.get(content["dtype"])
    if dtype is None:
        raise InputError(f"{path}: {name} is {content['dtype']}; only {', '.join(DTYPES)} can be converted")
    if end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
        raise ValueError(f"{name} has {end - begin} bytes for {shape}")
    return Stored(path, dtype, shape, data + begin)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A weight to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """Writes weights, in any order, into files whose headers are there from the beginning."""

    def __init__(self, folder: Path, weights: Sequence[Planned], shard_bytes: int):
        """
        Args:
            weights: all that is to come, in the order of the files.
            shard_bytes: a file is ended before a weight that would make it larger.
        """
        self._folder = folder
        self._places: dict[str, tuple[str, int, Planned]] = {}
        self._files: dict[str, BinaryIO] = {}
        self._left: dict[str, int] = {}
        self._total = sum(weight.size for weight in weights)
        shards = list(_shards(weights, shard_bytes))
        for number, shard in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._begin(name, shard)

    def _begin(self, file_name: str, shard: Sequence[Planned]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for weight in shard:
            end = at + weight.size
            header[weight.name] = {
                "dtype": BY_DTYPE[weight.dtype].safetensors,
                "shape": list(weight.shape),
                "data_offsets": [at, end],
            }
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data begin at a multiple of 8
        at = 8 + len(text)
        for weight in shard:
            self._places[weight.name] = (file_name, at, weight)
            at += weight.size
        self._files[file_name] = file = open(self._folder / file_name, "wb", buffering=0)  # noqa: SIM115
        _write_all(file, memoryview(struct.pack("<Q", len(text)) + text))
        file.truncate(at)
        self._left[file_name] = len(shard)

    def write(self, name: str, weight: Tensor) -> None:
        """One whole weight, contiguous, once."""
        file_name, at, planned = self._places.pop(name)
        if tuple(weight.shape) != planned.shape or weight.dtype != planned.dtype:
            raise ValueError(f"{name}: {weight.dtype} {tuple(weight.shape)} where {planned} was announced")
        file = self._files[file_name]
        file.seek(at)
        _write_all(file, memoryview(weight.view(-1).view(torch.uint8).numpy()))
        self._left[file_name] -= 1
        if not self._left[file_name]:  # to the disk while other files are being written
            os.fsync(file.fileno())
            file.close()

    def finish(self) -> None:
        """Check that everything is there; the index where there are several files."""
        if self._places:
            raise ValueError(f"never written: {', '.join(self._places)}")
        if len(self._files) > 1:
            weight_map = {name: file.name for file in self._paths() for name in read_header(file)}
            content = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self._folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _paths(self) -> Iterable[Path]:
        return (self._folder / name for name in self._files)


def _write_all(file: BinaryIO, content: memoryview) -> None:
    """An unbuffered file may take a part at a time."""
    while content:
        content = content[file.write(content) :]


def _shards(weights: Sequence[Planned], shard_bytes: int) -> Iterable[list[Planned]]:
    shard: list[Planned] = []
    for weight in weights:
        if shard and sum(other.size for other in shard) + weight.size > shard_bytes:
            yield shard
            shard = []
        shard.append(weight)
    if shard:
        yield shard


def same_content(files: WeightFiles, name: str, other_files: WeightFiles, other_name: str) -> bool:
    """Whether two stored weights have the same dtype, shape and bytes; read a piece at a time."""
    a, b = files.weights[name], other_files.weights[other_name]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    step = max(1, PIECE_BYTES // max(1, a.row_bytes))
    for first in range(0, a.shape[0], step):
        rows = min(step, a.shape[0] - first)
        read = [torch.empty(rows, *a.shape[1:], dtype=a.dtype) for _ in range(2)]
        files.read_into(read[0], name, first)
        other_files.read_into(read[1], other_name, first)
        if not read[0].view(torch.uint8).equal(read[1].view(torch.uint8)):
            return False
    return True
