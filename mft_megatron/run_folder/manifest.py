"""The manifest of a checkpoint: sizes and hashes of its files, written by the save.

::

    mft_checkpoint.json   its own digest, and that of …
    mft_manifest.json     … the size of every other file, and a hash of each 16 MiB of it
"""

import json
from collections.abc import Mapping
from pathlib import Path

from mft_megatron.errors import InputError
from mft_megatron.exit_codes import DAMAGED

from .file_hash import PIECE_BYTES, FileHash, digest
from .names import MANIFEST
from .replace_text import replace_text

_ALGORITHM = "xxh3_128"


class DamagedCheckpointError(InputError):
    """A checkpoint is unfinished or damaged; another one may be whole.

    Attributes:
        problem: what is wrong, without what to do.
    """

    def __init__(self, problem: str, remedy: str = ""):
        super().__init__(f"{problem}; {remedy}" if remedy else problem, code=DAMAGED)
        self.problem = problem


def write_manifest(path: Path, files: Mapping[str, FileHash]) -> str:
    """Write the manifest into the checkpoint folder ``path``.

    Args:
        path: folder of the checkpoint.
        files: size and hashes of each file by name, except this and the description.

    Returns:
        digest of the manifest, for the description.

    Raises:
        OSError: it cannot be written.
    """
    text = _text(files)
    replace_text(path / MANIFEST, text)
    return digest(text.encode())


def read_manifest(path: Path, expected: str) -> Mapping[str, FileHash]:
    """Read the manifest in the checkpoint folder ``path``.

    Args:
        path: folder of the checkpoint.
        expected: digest of the manifest, from the description.

    Returns:
        size and hashes of each file by name.

    Raises:
        DamagedCheckpointError: it is missing, damaged or that of another checkpoint.
    """
    file = path / MANIFEST
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{path}: its file {MANIFEST} is missing") from None
    if digest(content) != expected:
        raise DamagedCheckpointError(f"{file}: damaged, or of another checkpoint: its description has another hash")
    table = json.loads(content)
    if (table["hash"], table["piece_bytes"]) != (_ALGORITHM, PIECE_BYTES):
        raise InputError(f"{file}: {table['hash']} of {table['piece_bytes']} bytes is not known to this program")
    return {name: FileHash(size, tuple(pieces)) for name, (size, *pieces) in table["files"].items()}


def _text(files: Mapping[str, FileHash]) -> str:
    """A line for each file: its name, its size and its pieces."""
    head = json.dumps({"hash": _ALGORITHM, "piece_bytes": PIECE_BYTES})
    lines = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps([of.size, *of.pieces])}" for name, of in sorted(files.items())
    )
    return f'{head[:-1]}, "files": {{\n{lines}\n}}}}\n'
