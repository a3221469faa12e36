"""Comparison of a checkpoint's files with its manifest: sizes, hashes, and the description with its copy in a part.

Several processes can share the work: each compares some of the files and pieces. A line says what was compared.
"""

import dataclasses
import json
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mft_megatron.common_state import COMMON, INDEX, read_common
from mft_megatron.disk_errors import explain
from mft_megatron.errors import InputError

from .description import CheckpointInfo, CheckpointRef
from .file_hash import PIECE_BYTES, FileHash, Hasher, read_blocks
from .files import FORMAT, damage, remedy
from .manifest import DamagedCheckpointError, read_manifest
from .names import INFO

# values of --verify-checkpoint
AUTO, FULL, SIZES, OFF = LEVELS = ("auto", "full", "sizes", "off")
# bytes that each process reads with AUTO, at most
AUTO_BYTES = 16 * 2**30
# key of the description's copy in the common state
DESCRIPTION = "description"
# files that are read whole with AUTO, because one wrong byte can make all others useless
_SMALL = (INDEX, COMMON, FORMAT)
_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The files and pieces of a checkpoint that are compared, the same for all processes that share the work.

    Attributes:
        path: folder of the checkpoint.
        files: size and hashes of each file by name; none of an older format.
        pieces: files and numbers of the pieces that are hashed, in the order in which they are stored.
        level: one of :data:`LEVELS`.
    """

    path: Path
    files: Mapping[str, FileHash]
    pieces: Sequence[tuple[str, int]]
    level: str

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files.values())

    @property
    def hashed_bytes(self) -> int:
        """Size of the pieces that are hashed."""
        parts = (self.files[name].piece(number) for name, number in self.pieces)
        return sum(part.stop - part.start for part in parts)

    def find_damage(self, process: int = 0, processes: int = 1) -> str | None:
        """Compare one process's files and pieces; returns what is wrong, or ``None``."""
        names = sorted(self.files)[process::processes]
        begin, end = (len(self.pieces) * number // processes for number in (process, process + 1))
        with ThreadPoolExecutor(_THREADS) as threads:
            found = next(filter(None, threads.map(self._wrong_size, names)), None)
            if found is None:
                found = next(filter(None, threads.map(self._wrong_piece, self.pieces[begin:end])), None)
            threads.shutdown(cancel_futures=True)
        return found

    def describe(self, seconds: float) -> str:
        """Say in a line what was compared and how fast, after no damage was found."""
        if self.level == OFF:
            return f"{self.path}: its files were not compared with their hashes (--verify-checkpoint off)"
        if not self.files:
            return f"{self.path}: has no hashes, as an older version wrote it; its files are as long as its index needs"
        count = f"{len(self.files)} files, {self.bytes / 1e9:,.2f} GB"
        if self.level == SIZES:
            return f"{self.path}: its {count}, have their sizes; contents were not read (--verify-checkpoint sizes)"
        hashed = self.hashed_bytes
        took = f"in {seconds:.1f} s ({hashed / 1e9 / max(seconds, 1e-9):,.2f} GB/s)"
        if hashed == self.bytes:
            return f"{self.path}: whole: its {count}, have their hashes, read {took}"
        return (
            f"{self.path}: its {count}, have their sizes, and {len(self.pieces):,} pieces at random their hashes, "
            f"{hashed / 1e9:,.2f} GB read {took}; --verify-checkpoint full reads all"
        )

    def _wrong_size(self, name: str) -> str | None:
        try:
            size = (self.path / name).stat().st_size
        except FileNotFoundError:
            return f"its file {name} is missing"
        except OSError as error:
            return f"its file {name} cannot be read ({explain(error, self.path)})"
        expected = self.files[name].size
        if size != expected:
            how = "is cut off" if size < expected else "is too long"
            return f"its file {name} {how}: {size:,} of {expected:,} bytes are there"
        return None

    def _wrong_piece(self, piece: tuple[str, int]) -> str | None:
        name, number = piece
        part, hasher = self.files[name].piece(number), Hasher()
        try:
            for block in read_blocks(self.path / name, part):
                hasher.update(block)
        except OSError as error:
            return f"its file {name} cannot be read ({explain(error, self.path)})"
        if hasher.result().pieces != self.files[name].pieces[number : number + 1]:
            return f"its file {name} is damaged: bytes {part.start:,} to {part.stop - 1:,} have another hash"
        return None


def prepare(path: Path, info: CheckpointInfo, level: str, processes: int = 1, seed: int | None = None) -> Comparison:
    """Read the manifest of a checkpoint and choose what is compared; compare the description with its copy.

    Args:
        path: folder of the checkpoint.
        info: its description.
        level: one of :data:`LEVELS`; AUTO hashes all pieces up to 16 GiB for each process, and above that so many at
            random.
        processes: that share the work.
        seed: of the choice of pieces; the same on all processes.

    Raises:
        DamagedCheckpointError: a small file is missing or damaged, or the files are of different checkpoints.
    """
    if not info.manifest:
        if level != OFF and (problem := damage(path)) is not None:
            raise DamagedCheckpointError(f"{path}: {problem}")
        return Comparison(path, {}, (), level)
    refuse_other_description(path, info)
    if level == OFF:
        return Comparison(path, {}, (), level)
    files = read_manifest(path, info.manifest)
    pieces = [(name, number) for name in sorted(files) for number in range(len(files[name].pieces))]
    most = AUTO_BYTES // PIECE_BYTES * processes
    if level == SIZES:
        pieces = []
    elif level == AUTO and len(pieces) > most:
        draw = random.Random(seed)
        always = [piece for piece in pieces if piece[0] in _SMALL]
        others = [piece for piece in pieces if piece[0] not in _SMALL]
        pieces = sorted([*always, *draw.sample(others, max(0, most - len(always)))])
    return Comparison(path, files, pieces, level)


def refuse_other_description(path: Path, info: CheckpointInfo) -> None:
    """Refuse a description that is not the one in the checkpoint's common state.

    Raises:
        DamagedCheckpointError: the common state is damaged, or of another checkpoint, or the description was edited.
    """
    try:
        copy = read_common(path).get(DESCRIPTION)
    except InputError as error:
        raise DamagedCheckpointError(str(error)) from None
    if not isinstance(copy, dict):
        raise DamagedCheckpointError(f"{path}: its {COMMON} is missing, or that of a checkpoint without hashes")
    own = copied_description(info)
    for name, value in own.items():
        if copy.get(name) != value:
            raise DamagedCheckpointError(
                f"{path}: its description says {name} = {_short(value)}, its {COMMON} {_short(copy.get(name))}; the "
                "description was edited, or these are files of two checkpoints"
            )


def copied_description(info: CheckpointInfo) -> dict[str, object]:
    """The copy of a description that the common state holds: all but the digest of files, which the copy is one of."""
    copied: dict[str, object] = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(info, manifest=""))))
    return copied


def verify(path: Path, info: CheckpointInfo, level: str) -> str:
    """Compare the files of a checkpoint with its manifest, in this process alone.

    Returns:
        a line that says what was compared.

    Raises:
        DamagedCheckpointError: they differ.
    """
    start = time.perf_counter()
    comparison = prepare(path, info, level)
    if (problem := comparison.find_damage()) is not None:
        raise DamagedCheckpointError(f"{path}: {problem}")
    return comparison.describe(time.perf_counter() - start)


def require_whole(checkpoint: CheckpointRef, level: str) -> str:
    """Verify a checkpoint that a command reads, in this process alone.

    Returns:
        a line that says what was compared.

    Raises:
        InputError: it is damaged; names the newest whole one beside it.
    """
    try:
        return verify(checkpoint.path, checkpoint.info, level)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(error.problem, remedy(checkpoint.path, INFO)) from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
