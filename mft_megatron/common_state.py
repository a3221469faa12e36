"""The common state of a Megatron checkpoint: what is no tensor, read without executing any code in it.

::

    common.pt                                            Megatron-Core up to 0.18, and every checkpoint of this project
    .metadata ─► the object common_state in a .distcp    Megatron-Core from 0.19

Both are files of ``torch.save``. Neither torch nor Megatron-Core is needed.
"""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from .errors import InputError
from .parsing.inert_pickle import Inert, InertUnpickler

COMMON = "common.pt"
OBJECT = "common_state"
# Megatron-Core's key of an object's only shard
ENTRY = f"{OBJECT}/shard_0_1"
INDEX = ".metadata"


def read_common(path: Path) -> Mapping[str, object]:
    """Read the common state in the checkpoint folder ``path``.

    Returns:
        its content, empty if there is none. Numbers, texts, lists, tuples and dicts are themselves; everything else is
        an :class:`Inert`.

    Raises:
        InputError: its file is damaged, or was not written by torch.
    """
    file = path / COMMON
    if file.is_file():
        content = _unpickle(file, str(file))
    elif (stored := _stored_object(path)) is not None:
        found = _unpickle(*stored)
        content = found[0] if isinstance(found, list) and len(found) == 1 else found
    else:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: its common state holds no dict; it is not a checkpoint of Megatron-LM")
    return content


def read_args(common: Mapping[str, object]) -> Mapping[str, object] | None:
    """Arguments of the run that wrote a checkpoint, an ``argparse.Namespace``; ``None`` if there are none."""
    args = common.get("args")
    return args.state if isinstance(args, Inert) and args.name == "argparse.Namespace" else None


def _unpickle(file: Path | IO[bytes], name: str) -> object:
    """Unpickle what ``torch.save`` has written to ``file``; ``name`` says in messages where that is."""
    try:
        with zipfile.ZipFile(file) as archive:
            _refuse_compressed(archive)
            member = next(member for member in archive.namelist() if member.endswith("/data.pkl"))
            with archive.open(member) as stream:
                return InertUnpickler(stream).load()
    except Exception as error:  # a pickle can fail in any way
        raise _damaged(name, error) from None


def refuse_compressed(path: Path) -> None:
    """Check that the file ``common.pt`` of a checkpoint folder, if it is there, is no larger in memory than on disk.

    Raises:
        InputError: it is damaged, or compressed, which torch's are not.
    """
    file = path / COMMON
    if not file.is_file():
        return
    try:
        with zipfile.ZipFile(file) as archive:
            _refuse_compressed(archive)
    except Exception as error:  # a damaged archive can fail in any way
        raise _damaged(str(file), error) from None


def _refuse_compressed(archive: zipfile.ZipFile) -> None:
    for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{member.filename} in it is compressed")


def _stored_object(path: Path) -> tuple[IO[bytes], str] | None:
    """The bytes of the object ``common_state``, and its name for messages; ``None`` if there is none."""
    index = path / INDEX
    if not index.is_file():
        return None
    try:
        with open(index, "rb") as stream:
            metadata = InertUnpickler(stream).load()
        entries = metadata.state["storage_data"].items()
        found = [stored.state for key, stored in entries if key.state["fqn"] == ENTRY]
    except Exception as error:  # a pickle can fail in any way
        raise _damaged(str(index), error) from None
    if not found:
        return None
    name, offset, length = (found[0].get(key) for key in ("relative_path", "offset", "length"))
    if not (isinstance(name, str) and isinstance(offset, int) and isinstance(length, int)) or Path(name).name != name:
        raise InputError(f"{index}: does not say where {OBJECT} is stored; the checkpoint is damaged")
    if found[0].get("transform_descriptors"):
        raise InputError(f"{index}: {OBJECT} is stored compressed, which cannot be read; save without compression")
    where = f"{path / name}: {OBJECT}"
    try:
        with open(path / name, "rb") as stream:
            if offset + length > stream.seek(0, io.SEEK_END):
                raise ValueError("the file is too short")
            stream.seek(offset)
            return io.BytesIO(stream.read(length)), where
    except (OSError, ValueError) as error:
        raise _damaged(where, error) from None


def _damaged(name: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{name}: cannot be read ({reason}); the checkpoint is damaged")
