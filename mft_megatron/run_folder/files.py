"""The files of a distributed checkpoint against its index: which of them is missing or cut off, and what to load then.

The index ``.metadata`` says where in which ``.distcp`` file each slice is. Neither torch nor Megatron-Core is needed,
and no code in a checkpoint is executed.
"""

import zipfile
from pathlib import Path

from mft_megatron.common_state import COMMON, INDEX
from mft_megatron.parsing.inert_pickle import InertUnpickler

from .names import checkpoint_folders, iteration_of

# Megatron-Core's file that says which kind of checkpoint it is
FORMAT = "metadata.json"


def damage(path: Path) -> str | None:
    """Describe what is missing of the checkpoint folder ``path``; ``None`` if all files are as long as they must be.

    The common state may be in an object of the checkpoint instead of its file.
    """
    try:
        with open(path / INDEX, "rb") as stream:
            index = InertUnpickler(stream).load()
        sizes: dict[str, int] = {}
        for entry in index.state["storage_data"].values():
            name, end = entry.state["relative_path"], entry.state["offset"] + entry.state["length"]
            sizes[name] = max(sizes.get(name, 0), end)
    except FileNotFoundError:
        return f"its index {INDEX} is missing"
    except Exception as error:  # a pickle can fail in any way
        return f"its index {INDEX} cannot be read ({' '.join(str(error).split()) or type(error).__name__})"
    for name, needed in sorted(sizes.items()):
        try:
            size = (path / name).stat().st_size
        except FileNotFoundError:
            return f"its file {name} is missing"
        if size < needed:
            return f"its file {name} is cut off: {size:,} of {needed:,} bytes are there"
    if not (path / FORMAT).is_file():
        return f"its file {FORMAT} is missing"
    if (path / COMMON).is_file() and not zipfile.is_zipfile(path / COMMON):
        return f"its file {COMMON} is cut off"
    return None


def remedy(path: Path, description: str | None) -> str:
    """The sentence that names the newest checkpoint beside a damaged one that has all its files, and how to load it.

    Args:
        path: folder of the damaged checkpoint, ``iter_NNNNNNN`` in a run folder, or a file beside it; it need
            not exist.
        description: a file that a whole checkpoint has besides those of its index, if any.
    """
    others = [other for other in checkpoint_folders(path.parent) if other != path]
    for other in reversed(others):
        if (description is None or (other / description).is_file()) and damage(other) is None:
            step = iteration_of(other)
            return (
                f"{other.name} has all its files: give {other} instead, or with --load in training --ckpt-step {step}"
            )
    return (
        "none of the other checkpoints beside it has all its files"
        if others
        else "there is no other checkpoint beside it"
    )
