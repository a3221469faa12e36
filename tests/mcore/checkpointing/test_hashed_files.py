"""Files that torch's writers write are hashed, and on the disk before they get their names."""

import os

from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata

from mft_megatron.mcore.checkpointing.writers.hashed_files import HashedFileSystem
from mft_megatron.run_folder.file_hash import hash_file


def test_the_whole_index_is_synchronised(tmp_path, monkeypatch):
    """torch synchronises it while its bytes are in a buffer: after a loss of power it would be empty."""
    synced, fsync = {}, os.fsync

    def record(number):
        fsync(number)
        synced[os.path.basename(os.readlink(f"/proc/self/fd/{number}"))] = os.fstat(number).st_size

    monkeypatch.setattr(os, "fsync", record)
    files = {}
    writer = FileSystemWriter(tmp_path)
    writer.fs = HashedFileSystem(files)
    writer.finish(Metadata({}), [])
    assert files == {".metadata": hash_file(tmp_path / ".metadata")}
    assert synced == {".metadata.tmp": files[".metadata"].size}
