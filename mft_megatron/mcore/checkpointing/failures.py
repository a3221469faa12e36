"""Failures of reading and writing checkpoints as one line, the same on all ranks."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch.distributed.checkpoint.api import CheckpointException

from mft_megatron.errors import InputError, in_a_line
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.run_folder.files import damage, remedy
from mft_megatron.run_folder.names import INFO

T = TypeVar("T")


def agreed(path: Path, read: Callable[[], T]) -> T:
    """Read something of a checkpoint; a collective of all ranks, none of which waits for one that could not read.

    Args:
        path: the checkpoint's folder.
        read: reads, on this rank.

    Raises:
        InputError: a rank could not read; the same on all ranks.
    """
    try:
        result = read()
    except (Exception, CheckpointException) as error:  # torch's is no subclass of Exception
        process_groups.raise_on_all_ranks(error if isinstance(error, InputError) else reading_failed(path, error))
        raise
    process_groups.raise_on_all_ranks(None)
    return result


def reading_failed(path: Path, error: BaseException) -> str:
    """Say in a line why this rank cannot read the checkpoint ``path``."""
    if isinstance(error, InputError):
        return str(error)
    if (problem := damage(path)) is not None:
        return f"{path}: {problem}; the checkpoint is damaged; {remedy(path, INFO)}"
    return f"{path}: rank {torch.distributed.get_rank()} cannot load it ({reason(error)})"


def reason(error: BaseException) -> str:
    """Give the reason of an error in a line; for torch's collection of all ranks' failures that of the first one."""
    if isinstance(error, CheckpointException):
        # only the coordinator has the failures of other ranks
        failures = [failure for failure, _ in error.failures.values()]
        error = failures[0] if failures else RuntimeError("on another rank")
    return in_a_line(error)
