"""Comparison of a checkpoint's files with their hashes by all ranks, each of which reads a part."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import secrets
import time
from pathlib import Path

import torch.distributed as dist

from mft_megatron import progress_marks
from mft_megatron.disk_errors import explain
from mft_megatron.errors import InputError
from mft_megatron.mcore.parallel import process_groups, timeouts
from mft_megatron.run_folder.description import CheckpointInfo
from mft_megatron.run_folder.manifest import DamagedCheckpointError
from mft_megatron.run_folder.verification import Comparison, prepare


@timeouts.long_waits()
def verify(path: Path, info: CheckpointInfo, level: str) -> str:
    """Compare the files of a checkpoint with its manifest; a collective of all ranks.

    The main rank reads the manifest, and all share the other files.

    Args:
        path: folder of the checkpoint.
        info: its description.
        level: value of ``--verify-checkpoint``.

    Returns:
        a line that says what was compared and how fast.

    Raises:
        DamagedCheckpointError: a file is not as it was written, or cannot be read; the same on all ranks.
    """
    progress_marks.mark("load", checkpoint=str(path), doing="hashes")
    start = time.perf_counter()
    prepared = _prepare(path, info, level) if process_groups.is_main() else None
    prepared = process_groups.object_from_main(prepared)
    assert prepared is not None
    if isinstance(prepared, InputError):
        raise prepared
    problem = process_groups.first_of_any_rank(prepared.find_damage(dist.get_rank(), dist.get_world_size()))
    if problem is not None:
        raise DamagedCheckpointError(f"{path}: {problem}")
    return prepared.describe(time.perf_counter() - start)


def _prepare(path: Path, info: CheckpointInfo, level: str) -> Comparison | InputError:
    """Choose what is compared, or say what is wrong with the checkpoint."""
    try:
        return prepare(path, info, level, dist.get_world_size(), secrets.randbits(64))
    except InputError as error:
        return error
    except OSError as error:
        return DamagedCheckpointError(f"{path}: cannot be read ({explain(error, path)})")
