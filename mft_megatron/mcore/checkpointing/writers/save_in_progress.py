"""A save between its plan and its end: this rank writes its files at once or behind it, then all ranks make an index.

Megatron-Core has the same steps. There the first save of each rank starts processes that import torch, which stay for
ever and hold the rank's output, and a main rank that cannot write a small file leaves the others waiting.
"""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import functools
from pathlib import Path
from typing import Any, TypeAlias

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import Metadata

from mft_megatron.mcore.parallel import process_groups
from mft_megatron.run_folder.file_hash import FileHash, hash_file
from mft_megatron.run_folder.files import FORMAT
from mft_megatron.run_folder.publishing import sync_file

from .background import Background
from .hashed_files import HashedFileSystem
from .part_files import PartFile, Written, write_files

# of torch.distributed.checkpoint, with the folder
StorageWriter: TypeAlias = Any


class SaveInProgress:
    """The files of one save, planned by all ranks.

    Attributes:
        failure: why this rank's files could not be written, once they are.
        hashes: of files by name that the main rank writes besides.
    """

    def __init__(self, writer: StorageWriter, index: Metadata | None):
        """Prepare to write.

        Args:
            writer: knows the folder and the files of this rank.
            index: of the checkpoint, without places; on the main rank alone.
        """
        self._writer, self._index = writer, index
        self._written = Written()
        self._background: Background[Written] | None = None
        self.failure: Exception | None = None
        self.hashes: dict[str, FileHash] = {}

    def write(self, in_background: bool) -> None:
        """Copy what this rank writes to the host, and write it; no error is raised here, on a rank alone.

        Args:
            in_background: let a process write that is forked now.
        """
        _, copy_to_host, _ = self._writer.get_save_function_and_args()
        try:
            files: list[PartFile] = [] if copy_to_host is None else copy_to_host()
            # what was copied need not stay on the device until the files are written
            copy_to_host = self._writer.write_buckets = None
            if not in_background:
                self._written = write_files(files)
            elif files:
                self._background = Background(functools.partial(write_files, files))
        except Exception as error:
            self.failure = error

    def has_ended(self) -> bool:
        """Whether every rank has written; does not wait for a disk; a collective of all ranks."""
        return not process_groups.any_rank(self._background is not None and not self._background.ended)

    def wait(self) -> None:
        """Wait until this rank has written."""
        if self._background is not None:
            try:
                self._written = self._background.result()
            except Exception as error:
                self.failure = error
            self._background = None

    def gather(self) -> list[Written]:
        """Gather on the main rank what each rank has written; empty on the others; a collective of all ranks."""
        gathered: list[Any] | None = [None] * dist.get_world_size() if process_groups.is_main() else None
        dist.gather_object(self._written, gathered)
        return gathered or []

    def write_index(self, written: list[Written]) -> dict[str, FileHash]:
        """Write the files of the whole checkpoint, on the main rank alone.

        Args:
            written: by each rank.

        Returns:
            size and hashes of all files of the checkpoint by name.

        Raises:
            OSError: one cannot be written.
        """
        assert self._index is not None
        folder = Path(self._writer.checkpoint_dir)
        files = {**self.hashes, **{name: found for part in written for name, found in part.hashes.items()}}
        self._writer.fs = HashedFileSystem(files)
        self._writer.finish(self._index, [part.items for part in written])
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        sync_file(folder / FORMAT)
        return {**files, FORMAT: hash_file(folder / FORMAT)}


class SaveStrategy(TorchDistSaveShardedStrategy):
    """Megatron-Core's plan of a save, whose writing is ours."""

    def _get_save_and_finalize_callbacks(self, writer: StorageWriter, planned: Any, *way: object) -> SaveInProgress:
        return SaveInProgress(writer, planned[1])
