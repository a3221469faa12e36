"""Writing of safetensors shards, one weight at a time and in any order."""

import contextlib
import dataclasses
import io
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mft_megatron.mcore.checkpointing.finite import refuse_to_write
from mft_megatron.mcore.platform.precisions import BY_DTYPE

from .safetensors_reader import INDEX, SINGLE, read_header


@dataclasses.dataclass(frozen=True)
class PlannedWeight:
    """A weight that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole weight."""
        return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """Writes weights, in any order, into files whose headers are written first."""

    def __init__(self, folder: Path, weights: Sequence[PlannedWeight], shard_bytes: int):
        """Create the files and write their headers.

        Args:
            weights: all that will be written, in the order of the files.
            shard_bytes: a file is ended before a weight that would make it larger.
        """
        self._folder = folder
        self._positions: dict[str, tuple[str, int, PlannedWeight]] = {}
        self._files: dict[str, io.FileIO] = {}
        self._left: dict[str, int] = {}
        self._total = sum(weight.size for weight in weights)
        shards = list(_shards(weights, shard_bytes))
        for number, shard in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._begin(name, shard)

    def _begin(self, file_name: str, shard: Sequence[PlannedWeight]) -> None:
        """Write the header of a file, and extend the file to its final size."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for weight in shard:
            end = offset + weight.size
            header[weight.name] = {
                "dtype": BY_DTYPE[weight.dtype].safetensors,
                "shape": list(weight.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data begin at a multiple of 8
        offset = 8 + len(text)
        for weight in shard:
            self._positions[weight.name] = (file_name, offset, weight)
            offset += weight.size
        self._files[file_name] = file = open(self._folder / file_name, "wb", buffering=0)  # noqa: SIM115
        _write_all(file, memoryview(struct.pack("<Q", len(text)) + text))
        file.truncate(offset)
        self._left[file_name] = len(shard)

    def write(self, name: str, weight: Tensor) -> None:
        """Write a whole weight, which must be contiguous, on the CPU, and of the planned dtype and shape; once each.

        Raises:
            ValueError: dtype or shape is not as planned.
            InputError: an element is NaN or infinite.
        """
        file_name, offset, planned = self._positions.pop(name)
        if tuple(weight.shape) != planned.shape or weight.dtype != planned.dtype:
            raise ValueError(f"{name}: {weight.dtype} {tuple(weight.shape)} where {planned} was announced")
        refuse_to_write(weight, name)
        file = self._files[file_name]
        file.seek(offset)
        _write_all(file, weight.view(-1).view(torch.uint8).numpy().data)
        self._left[file_name] -= 1
        if not self._left[file_name]:  # flush a complete file while others are being written
            os.fsync(file.fileno())
            file.close()

    def finish(self) -> None:
        """Check that every weight was written; write the index if there are several files.

        Raises:
            ValueError: a weight was not written.
        """
        if self._positions:
            raise ValueError(f"never written: {', '.join(self._positions)}")
        if len(self._files) > 1:
            weight_map = {name: file for file in self._files for name in read_header(self._folder / file)}
            content = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self._folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def write_shards(
    folder: Path, planned: Sequence[PlannedWeight], weights: Iterable[tuple[str, Tensor]], shard_bytes: int
) -> None:
    """Write all weights of a folder, and the index if there are several files.

    Args:
        folder: an existing folder.
        planned: all weights, in the order of the files.
        weights: name and content of each, as :meth:`ShardWriter.write` takes them, in any order.
        shard_bytes: a file is ended before a weight that would make it larger.

    Raises:
        ValueError: a weight is missing, or not as planned.
        InputError: an element of a weight is NaN or infinite.
        OSError: a file cannot be written.
    """
    with contextlib.closing(ShardWriter(folder, planned, shard_bytes)) as writer:
        for name, weight in weights:
            writer.write(name, weight)
        writer.finish()


def _write_all(file: io.FileIO, content: memoryview) -> None:
    """Write everything: an unbuffered file may take a part at a time."""
    while content:
        content = content[file.write(content) :]


def _shards(weights: Sequence[PlannedWeight], shard_bytes: int) -> Iterator[list[PlannedWeight]]:
    shard: list[PlannedWeight] = []
    for weight in weights:
        if shard and sum(other.size for other in shard) + weight.size > shard_bytes:
            yield shard
            shard = []
        shard.append(weight)
    if shard:
        yield shard
