"""Symbolic links among files that are copied: one that leads elsewhere would publish a file that nobody named."""

from pathlib import Path

from mft_megatron.errors import InputError

# of a repository in the cache of Hugging Face: snapshots/REVISION/FILE is a link to blobs/HASH
_BLOBS, _SNAPSHOTS = "blobs", "snapshots"


def refuse_odd_link(file: Path) -> None:
    """Check that a file may be copied: it is no link, or leads to a file of its name or into Hugging Face's cache.

    Raises:
        InputError: it leads elsewhere, as ``LICENSE`` of a stranger's folder may lead to a private key.
    """
    if not file.is_symlink():
        return
    target, folder = file.resolve(), file.parent.resolve()
    of_cache = target.parent.name == _BLOBS and folder.is_relative_to(target.parent.parent / _SNAPSHOTS)
    if target.name != file.name and not of_cache:
        raise InputError(f"{file}: a link to {target}, which is no file of this folder; put a copy there, or remove it")
