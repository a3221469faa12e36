"""Digest of a model's weight files, by which adapters recognise their model."""

import hashlib
from pathlib import Path

# content_digest reads this many blocks of each file, of this many bytes.
_DIGEST_BLOCKS, _DIGEST_BYTES = 64, 4096


def content_digest(folder: Path) -> str:
    """Digest of a model's weight files, in hex: of their names and sizes, and of some blocks of each.

    Args:
        folder: a Hugging Face model or one checkpoint. Less than a mebibyte of each file is read.
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".distcp")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as stream:
            for block in range(_DIGEST_BLOCKS):
                stream.seek(size * block // _DIGEST_BLOCKS)
                digest.update(stream.read(_DIGEST_BYTES))
    return digest.hexdigest()
