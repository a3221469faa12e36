"""The files of a checkpoint with a rank's weights and states, written side by side, each fsynced before it counts."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

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

# Megatron-Core's: path, name in the checkpoint, and content: objects as bytes, tensors on the CPU
PartFile: TypeAlias = "tuple[str | Path, str, tuple[list[tuple[WriteItem, BytesIO]], list[tuple[WriteItem, Tensor]]]]"


def write_files(files: Sequence[PartFile]) -> list[WriteResult]:
    """Write files at the same time, a thread for each, and fsync them.

    Args:
        files: paths that do not exist, with what they are to hold.

    Returns:
        where each item is, for the index of the checkpoint.

    Raises:
        OSError: a file cannot be written; some of the others may be.
    """
    if len(files) < 2:
        return [result for file in files for result in _write_file(file)]
    with ThreadPoolExecutor(len(files)) as threads:
        return [result for results in threads.map(_write_file, files) for result in results]


def _write_file(file: PartFile) -> list[WriteResult]:
    path, name, (objects, tensors) = file
    results = []
    with open(path, "xb") as stream:
        for item, content in objects:
            offset = stream.tell()
            stream.write(content.getbuffer())
            results.append(_result(item, name, offset, stream.tell()))
        for item, tensor in tensors:
            offset = stream.tell()
            try:
                torch.save(tensor, stream)
            except RuntimeError as error:
                # torch raises its own error over the OSError that names the cause
                raise disk_error(error) or error from None
            results.append(_result(item, name, offset, stream.tell()))
        stream.flush()
        os.fsync(stream.fileno())
    return results


def _result(item: WriteItem, name: str, begin: int, end: int) -> WriteResult:
    return WriteResult(item.index, end - begin, _StorageInfo(name, begin, end - begin))
