"""The file system of torch's checkpoint writers, with files that are hashed while they are written.

torch synchronises the index of a checkpoint while its bytes are still in the process's buffer, so here each file is
synchronised when it is complete.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystem

from mft_megatron.run_folder.file_hash import FileHash, create_hashed
from mft_megatron.run_folder.publishing import sync_file


class HashedFileSystem(FileSystem):
    """Local files; those that are written are hashed."""

    def __init__(self, files: dict[str, FileHash]):
        """
        Args:
            files: takes size and hashes of each file by name when it is closed.
        """
        super().__init__()
        self._files = files

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[object]:  # type: ignore[override]
        """Open a file; one that was written is on the disk when the block ends."""
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        buffer, file = create_hashed(path)
        with buffer:
            yield buffer
        sync_file(Path(path))
        self._files[Path(path).name] = file.result()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file."""
        super().rename(path, new_path)
        if (written := self._files.pop(Path(path).name, None)) is not None:
            self._files[Path(new_path).name] = written
