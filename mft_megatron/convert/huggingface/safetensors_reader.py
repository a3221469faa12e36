"""Reading of safetensors files, some rows at a time.

::

    file      8 bytes: length n of the header, little-endian │ n bytes: JSON {name: {dtype, shape, data_offsets}} │ data
    folder    model.safetensors, or model-0000k-of-0000n.safetensors with model.safetensors.index.json

The safetensors library maps files or loads whole shards; here only the requested rows are in memory.
"""

import dataclasses
import io
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from mft_megatron.errors import InputError
from mft_megatron.mcore.checkpointing.finite import refuse_non_finite
from mft_megatron.mcore.platform.precisions import PRECISIONS
from mft_megatron.parsing.git_lfs import refuse_pointer

DTYPES = {precision.safetensors: precision.dtype for precision in PRECISIONS}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100 * 2**20
# Buffers that old versions of transformers stored although they follow from the configuration: masks, and angles.
COMPUTED_BUFFERS = (
    *(".attention.bias", ".attention.masked_bias"),
    *(".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached"),
)
# files in folders without SINGLE and INDEX, and what to do about them; the first that is there counts
_OTHERS = {
    "adapter_model.*": "it is an adapter of PEFT, for --hf-adapter and merge-lora: give the model that it belongs to",
    "model-*-of-*.safetensors": f"download {INDEX}",
    "consolidated*": "that is the format of its makers' own code; download the safetensors files of transformers",
    "*.gguf": "that is llama.cpp's format, mostly quantised; download the model that it was made of",
    "*.bin": (
        "its weights are no safetensors files; load the model with transformers and write it again with save_pretrained"
    ),
}
_DAMAGED = "the model is damaged: download it again, or take an earlier checkpoint of its training"
# part of a weight that is in memory at a time
BLOCK_BYTES = 128 * 2**20


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """Position of a weight on disk; ``offset``: of its first byte in ``file``."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class _HeaderEntry(TypedDict):
    dtype: str
    shape: list[int]
    data_offsets: list[int]


class WeightFiles:
    """The weights of a Hugging Face folder; every header is read at the start and compared with its file."""

    def __init__(self, folder: Path):
        """Read and check every header.

        Raises:
            InputError: no safetensors files there, one is missing, damaged or cut off, or index and files disagree.
        """
        self.folder = folder
        self.weights: dict[str, StoredWeight] = {}
        self._open: dict[Path, io.FileIO] = {}
        index, single = folder / INDEX, folder / SINGLE
        if index.is_file():
            self._read_index(index)
        elif single.is_file():
            self.weights = read_header(single)
        else:
            raise InputError(f"{folder}: {_other_weights(folder)}")

    def read_into(self, rows: Tensor, name: str, first: int) -> None:
        """Fill ``rows`` with consecutive whole rows of a weight.

        Args:
            rows: contiguous [n, …], of the weight's dtype, on the CPU.
            first: first row of the weight to read.

        Raises:
            InputError: the file has become shorter, or has a NaN or an infinity there.
        """
        stored = self.weights[name]
        file = self._file(stored.file)
        file.seek(stored.offset + first * stored.row_bytes)
        content = rows.view(-1).view(torch.uint8).numpy().data
        while content:
            count = file.readinto(content)
            if not count:
                raise InputError(f"{stored.file}: ends within {name}; the file is cut off")
            content = content[count:]
        refuse_non_finite(rows, f"{stored.file}: {name}", _DAMAGED)

    def read_block(self, block: Tensor, name: str, first: int, column: int) -> None:
        """Fill ``block`` with consecutive rows of a weight, which may be cut to some columns.

        Args:
            block: contiguous [n, …], of the weight's dtype, on the CPU.
            first: first row of the weight to read.
            column: first column of the weight to read.

        Raises:
            InputError: the file has become shorter, or has a NaN or an infinity there.
        """
        stored = self.weights[name]
        if block.shape[1:] == stored.shape[1:]:
            return self.read_into(block, name, first)
        # whole rows would be read once by every rank; of a memory map only the pages of these columns are read
        size = stored.dtype.itemsize
        whole = np.memmap(stored.file, np.uint8, "r", stored.offset, (stored.shape[0], stored.row_bytes))
        columns = whole[first : first + len(block), column * size : (column + block.shape[1]) * size]
        block.view(torch.uint8).numpy()[:] = columns
        refuse_non_finite(block, f"{stored.file}: {name}", _DAMAGED)

    def close(self) -> None:
        """Close the files; reading opens them again."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _file(self, path: Path) -> io.FileIO:
        if path not in self._open:
            self._open[path] = open(path, "rb", buffering=0)  # noqa: SIM115
        return self._open[path]

    def rename(self, names: Mapping[str, str]) -> None:
        """Give weights other names.

        Args:
            names: the new name of each weight.
        """
        self.weights = {names[name]: stored for name, stored in self.weights.items()}

    def _read_index(self, index: Path) -> None:
        refuse_pointer(index)
        try:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names_by_file: dict[str, set[str]] = {}
            for name, file in weight_map.items():
                if name.endswith(COMPUTED_BUFFERS):
                    continue
                if not isinstance(file, str):
                    raise TypeError(f"{name} is in no file")
                names_by_file.setdefault(file, set()).add(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: not an index of weights ({error}); download it again") from None
        for file, names in sorted(names_by_file.items()):
            if Path(file).name != file:
                raise InputError(f"{index}: names {file!r}, which is no file of this folder; download it again")
            if not (self.folder / file).is_file():
                raise InputError(f"{index}: names {file}, which is not there; download it")
            stored = read_header(self.folder / file)
            if missing := sorted(names - stored.keys()):
                raise InputError(f"{self.folder / file}: lacks {missing[0]}, which {INDEX} says is there")
            if extra := sorted(stored.keys() - names):
                raise InputError(f"{self.folder / file}: has {extra[0]}, which {INDEX} does not say is there")
            self.weights.update(stored)


def _other_weights(folder: Path) -> str:
    """Describe what a folder without a model's safetensors files has instead, and what to do."""
    for pattern, problem in _OTHERS.items():
        if file := next(iter(sorted(folder.glob(pattern))), None):
            return f"has {file.name} and neither {SINGLE} nor {INDEX}; {problem}"
    return f"has neither {SINGLE} nor {INDEX}; give the folder of a model"


def read_header(path: Path) -> dict[str, StoredWeight]:
    """Read the header of a safetensors file: its weights by name, without computed buffers.

    Raises:
        InputError: the file has another format, is damaged, or is shorter or longer than its header says.
    """
    refuse_pointer(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, LONGEST_HEADER):
            raise InputError(f"{path}: cut off, or no safetensors file; download it again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            weights = {
                name: _stored_weight(path, name, entry, 8 + length)
                for name, entry in header.items()
                if not name.endswith(COMPUTED_BUFFERS)
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: its header is damaged ({error}); download it again") from None
    data_size = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + data_size != size:
        raise InputError(f"{path}: {size} bytes, its header says {8 + length + data_size}; download it again")
    return weights


def _stored_weight(path: Path, name: str, entry: _HeaderEntry, data: int) -> StoredWeight:
    """One entry of a header, whose data begin at byte ``data``; damaged ones raise whatever Python raises."""
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        remedy = "load the model with transformers in fp32 and write it again with save_pretrained"
        if entry["dtype"] != "F64":
            remedy = "if the model is quantised, take the one that it was made of"
        raise InputError(f"{path}: {name} is {entry['dtype']}; only {', '.join(DTYPES)} can be converted; {remedy}")
    if end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
        raise ValueError(f"{name} has {end - begin} bytes for {shape}")
    return StoredWeight(path, dtype, shape, data + begin)


def same_content(files: WeightFiles, name: str, other_files: WeightFiles, other_name: str) -> bool:
    """Whether two stored weights have the same dtype, shape and bytes; one block at a time is in memory."""
    a, b = files.weights[name], other_files.weights[other_name]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    step = max(1, BLOCK_BYTES // max(1, a.row_bytes))
    for first in range(0, a.shape[0], step):
        rows = min(step, a.shape[0] - first)
        blocks = [torch.empty(rows, *a.shape[1:], dtype=a.dtype) for _ in range(2)]
        files.read_into(blocks[0], name, first)
        other_files.read_into(blocks[1], other_name, first)
        if not blocks[0].view(torch.uint8).equal(blocks[1].view(torch.uint8)):
            return False
    return True
