"""Facts about checkpoints, as JSON has them: what is in them, where they come from, and whether they are whole."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mft_megatron.common_state import INDEX
from mft_megatron.errors import InputError
from mft_megatron.parsing.inert_pickle import InertUnpickler
from mft_megatron.run_folder.description import CheckpointInfo, read_info
from mft_megatron.run_folder.manifest import DamagedCheckpointError, read_manifest
from mft_megatron.run_folder.names import BEST, INFO, MANIFEST, TRACKER, checkpoint_folders, iteration_folder
from mft_megatron.run_folder.outcome import read_outcome
from mft_megatron.run_folder.owner.owner import describe_owner
from mft_megatron.run_folder.verification import verify

Facts = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One checkpoint.

    Attributes:
        path: its folder.
        info: its description; ``None`` if that is missing or damaged.
        damage: what is wrong with it; ``None`` if nothing was found.
        compared: what was compared; empty where it is damaged.
        files: number of its files.
        size: of its files, in bytes.
        entries: number of weights, states of the optimizer and other objects.
        unlisted: files in its folder that its manifest does not have.
    """

    path: Path
    info: CheckpointInfo | None
    damage: str | None
    compared: str
    files: int
    size: int
    entries: Mapping[str, int]
    unlisted: Sequence[str]

    def facts(self) -> Facts:
        """The same as plain values."""
        info = {} if self.info is None else dataclasses.asdict(self.info)
        own = {"path": str(self.path), "damage": self.damage, "compared": self.compared}
        content = {
            "files": self.files,
            "bytes": self.size,
            "entries": dict(self.entries),
            "unlisted": list(self.unlisted),
        }
        return {**own, **content, "description": info}


def checkpoint_facts(path: Path, level: str) -> Checkpoint:
    """Look at the checkpoint in the folder ``path``.

    Args:
        path: its folder.
        level: how its files are compared with their hashes, as in ``--verify-checkpoint``.

    Raises:
        InputError: another program or a newer version wrote it.
    """
    there = {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}
    info, damage, compared, unlisted = None, None, "", []
    try:
        info = read_info(path)
        compared = verify(path, info, level)
        if info.manifest:
            unlisted = sorted(there.keys() - {INFO, MANIFEST, *read_manifest(path, info.manifest)})
    except DamagedCheckpointError as error:
        damage = error.problem
    return Checkpoint(path, info, damage, compared, len(there), sum(there.values()), _entries(path), unlisted)


def run_facts(folder: Path, level: str) -> tuple[Facts, list[Checkpoint]]:
    """Look at a run folder and its checkpoints, oldest first.

    Raises:
        InputError: there is no checkpoint in it.
    """
    paths = [path for path in checkpoint_folders(folder) if not path.is_symlink()]
    if not paths:
        ended = read_outcome(folder) is not None
        remedy = "--outcome says how its run ended" if ended else "give a folder that --save wrote, or one iter_ folder"
        raise InputError(f"{folder}: no checkpoint is there; {remedy}")
    checkpoints = []
    for path in paths:
        try:
            checkpoints.append(checkpoint_facts(path, level))
        except InputError as error:
            checkpoints.append(Checkpoint(path, None, str(error), "", 0, 0, {}, []))
    outcome = read_outcome(folder)
    run = {
        "folder": str(folder),
        "newest": _named(folder, TRACKER),
        "best": _named(folder, BEST),
        "unfinished": sorted(path.name for path in folder.glob(".saving.*")),
        "owner": describe_owner(folder),
        "outcome": None if outcome is None else dataclasses.asdict(outcome),
    }
    return run, checkpoints


def _named(folder: Path, name: str) -> str | None:
    """The folder of the checkpoint that a file of the run folder names, or what is wrong with the file."""
    file = folder / name
    if not file.is_file():
        return None
    text = file.read_bytes().decode(errors="backslashreplace").strip()
    if not text.isdecimal():
        return f"{text!r}, which is no iteration"
    path = iteration_folder(folder, int(text))
    return path.name if path.is_dir() else f"{path.name}, which is missing"


def _entries(path: Path) -> dict[str, int]:
    """Number of weights, states and objects in the index; empty if it cannot be read."""
    try:
        with open(path / INDEX, "rb") as stream:
            entries = InertUnpickler(stream).load().state["state_dict_metadata"]
        names = [(name, entry.name.rpartition(".")[2]) for name, entry in entries.items()]
    except Exception:  # a pickle can fail in any way
        return {}
    tensors = [name for name, kind in names if kind == "TensorStorageMetadata"]
    states = sum(name.startswith("optimizer.") for name in tensors)
    return {"weights": len(tensors) - states, "optimizer states": states, "objects": len(names) - len(tensors)}
