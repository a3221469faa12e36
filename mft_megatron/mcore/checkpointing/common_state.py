"""State in a checkpoint that is the same on all ranks and not sharded: numbers, strings, small tensors.

Megatron-Core keeps it in ``common.pt`` up to 0.18, and since 0.19 in a sharded object of the checkpoint. Here it is
always in ``common.pt``, which all supported releases load; where Megatron-Core writes the object, that is there, too.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import inspect
import io
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from mft_megatron.common_state import COMMON, ENTRY, OBJECT, refuse_compressed
from mft_megatron.errors import InputError
from mft_megatron.run_folder.file_hash import FileHash, write_hashed
from mft_megatron.run_folder.files import remedy
from mft_megatron.run_folder.names import INFO, TRACKER

from .tensor_reader import TensorReader

# releases that read the object no longer take a strategy for the file
_READS_OBJECT = "common_strategy" not in inspect.signature(dist_checkpointing.load).parameters


def if_it_fails(path: Path) -> str:
    """The consequence for the run when the checkpoint ``path``, a folder in the run's, cannot be written."""
    if (path.parent / TRACKER).is_file():
        return "the previous checkpoint is still the newest of the run"
    return f"no checkpoint was completed in {path.parent}, so nothing can be resumed from there yet"


def write_common(common: dict[str, Any], path: Path) -> FileHash:
    """Write ``common.pt``, on the main rank alone.

    Args:
        common: the state that is not sharded.
        path: the checkpoint's folder.

    Returns:
        size and hashes of the file.

    Raises:
        OSError: it cannot be written.
    """
    # torch.save to a path would hide the OSError of a full disk
    content = io.BytesIO()
    torch.save(common, content)
    return write_hashed(path / COMMON, content.getbuffer())


def sharded_copy(common: dict[str, Any]) -> dict[str, ShardedObject]:
    """The entries of a sharded state dict in which this release of Megatron-Core looks for the common state."""
    if not _READS_OBJECT:
        return {}
    return {OBJECT: ShardedObject(OBJECT, common, (1,), (0,), replica_id=torch.distributed.get_rank())}


def require_common(path: Path, reader: TensorReader) -> None:
    """Refuse a checkpoint whose common state this release cannot read.

    Raises:
        InputError: it is compressed or in neither form, or only in the object, and this release reads only the file.
    """
    if (path / COMMON).is_file():
        refuse_compressed(path)
        return
    if not reader.has_entry(ENTRY):
        raise InputError(f"{path}: {COMMON} is missing; the checkpoint is damaged; {remedy(path, INFO)}")
    if not _READS_OBJECT:
        raise InputError(
            f"{path}: {COMMON} is missing, and the installed Megatron-Core reads nothing else; restore the file, or "
            "load the checkpoint with Megatron-Core 0.19 or later"
        )
