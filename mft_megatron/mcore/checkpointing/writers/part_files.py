"""The files of a checkpoint with a rank's weights and states, written side by side, each fsynced before it counts.

Its bytes are hashed on their way to the disk. Nothing is read again.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import dataclasses
import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from mft_megatron.disk_errors import disk_error
from mft_megatron.run_folder.file_hash import FileHash, create_hashed

# Megatron-Core's: path, name in the checkpoint, and content: objects as bytes, tensors on the CPU
PartFile: TypeAlias = "tuple[str | Path, str, tuple[list[tuple[WriteItem, BytesIO]], list[tuple[WriteItem, Tensor]]]]"


@dataclasses.dataclass(frozen=True)
class Written:
    """Files of one rank that are on the disk.

    Attributes:
        items: where each item is, for the index of the checkpoint.
        hashes: size and hashes of each file by name.
    """

    items: list[WriteResult] = dataclasses.field(default_factory=list)
    hashes: dict[str, FileHash] = dataclasses.field(default_factory=dict)


def write_files(files: Sequence[PartFile]) -> Written:
    """Write files at the same time, a thread for each, and fsync them.

    Args:
        files: paths that do not exist, with what they are to hold.

    Raises:
        OSError: a file cannot be written; some of the others may be.
    """
    if len(files) < 2:
        parts = [_write_file(file) for file in files]
    else:
        with ThreadPoolExecutor(len(files)) as threads:
            parts = list(threads.map(_write_file, files))
    written = Written()
    for part in parts:
        written.items.extend(part.items)
        written.hashes.update(part.hashes)
    return written


def _write_file(file: PartFile) -> Written:
    path, name, (objects, tensors) = file
    items = []
    stream, hashed = create_hashed(path)
    with stream:
        for item, content in objects:
            offset = stream.tell()
            stream.write(content.getbuffer())
            items.append(_result(item, name, offset, stream.tell()))
        for item, tensor in tensors:
            offset = stream.tell()
            try:
                torch.save(tensor, stream)
            except RuntimeError as error:
                # torch raises its own error over the OSError that names the cause
                raise disk_error(error) or error from None
            items.append(_result(item, name, offset, stream.tell()))
        stream.flush()
        os.fsync(hashed.fileno())
        there = os.fstat(hashed.fileno()).st_size
        if there != stream.tell():
            raise OSError(errno.EIO, f"{there:,} of {stream.tell():,} bytes are there after writing", str(path))
    return Written(items, {name: hashed.result()})


def _result(item: WriteItem, name: str, begin: int, end: int) -> WriteResult:
    return WriteResult(item.index, end - begin, _StorageInfo(name, begin, end - begin))
