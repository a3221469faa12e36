"""Pickles in a checkpoint, loaded without executing any code that they name.

A distributed checkpoint has three kinds: its index ``.metadata``, objects such as random-number states, and extra
states of Transformer Engine's layers. Torch and Transformer Engine load them with Python's pickle, which calls whatever
function a pickle names.
"""

import io
import os
import pickle
import types
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import default_planner, filesystem
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from mft_megatron.parsing.inert_pickle import Inert, InertUnpickler

# what an index is made of; other names in it, such as those of save plans, are not needed
_CLASSES = (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    TensorProperties,
    _MEM_FORMAT_ENCODING,
    _StorageInfo,
    torch.Size,
    torch.serialization._get_layout,
)
_BY_NAME = {(known.__module__, known.__qualname__): known for known in _CLASSES}


class IndexUnpickler(InertUnpickler):
    """Unpickler that knows dtypes and the classes of torch's index; every other name stands for an inert class."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class of torch's index, a dtype, or an inert class of that name."""
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        return _BY_NAME.get((module, name)) or super().find_class(module, name)


def _member(owner: object, name: str) -> object:
    """A memory format: the first releases of Python 3.11 pickle members of an enum by name, all others by value."""
    return _MEM_FORMAT_ENCODING[name] if owner is _MEM_FORMAT_ENCODING else Inert(owner, name)


# what Transformer Engine's extra states are made of, besides its recipes
_OF_EXTRA_STATES = {
    ("collections", "OrderedDict"),
    ("io", "BytesIO"),
    ("_io", "BytesIO"),
    ("torch", "Size"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch.storage", "_load_from_bytes"),
    ("torch.storage", "UntypedStorage"),
    ("megatron.core.safe_globals", "safe_load_from_bytes"),
    *(("builtins", name) for name in ("dict", "list", "tuple", "set", "int", "float", "bool", "bytes", "bytearray")),
}
_RECIPES = "transformer_engine.common.recipe"
_RECIPE_NAMES = {("megatron.core.extensions.transformer_engine", "TEDelayedScaling")}


def load_index(stream: IO[bytes]) -> Metadata:
    """Load the index of a checkpoint.

    Args:
        stream: the open file ``.metadata``.

    Raises:
        ValueError: it is no index of torch, or a part of it has another type or names a file of another folder.
        Exception: it is no pickle.
    """
    index = IndexUnpickler(stream).load()
    if not isinstance(index, Metadata) or not isinstance(index.state_dict_metadata, dict):
        raise ValueError("it holds no index of torch")
    for name, entry in index.state_dict_metadata.items():
        if not (isinstance(name, str) and isinstance(entry, TensorStorageMetadata | BytesStorageMetadata)):
            raise ValueError(f"{name!r} is no entry of an index")
        if isinstance(entry, TensorStorageMetadata) and not _is_whole(entry):
            raise ValueError(f"its entry {name} is damaged")
    if not isinstance(index.storage_data, dict):
        raise ValueError("it does not say where entries are stored")
    for key, stored in index.storage_data.items():
        if not (isinstance(key, MetadataIndex) and isinstance(stored, _StorageInfo)):
            raise ValueError("it does not say where entries are stored")
        name, numbers = stored.relative_path, (stored.offset, stored.length)
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{key.fqn} is stored in {name!r}, which is no file of this folder")
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(f"it does not say where in {name} {key.fqn} is stored")
    return index


def _is_whole(entry: TensorStorageMetadata) -> bool:
    """Whether shape, dtype and chunks of a tensor have their types."""
    typed = isinstance(entry.properties, TensorProperties) and isinstance(entry.properties.dtype, torch.dtype)
    if not typed or not isinstance(entry.chunks, list):
        return False
    chunks = [(getattr(chunk, "offsets", None), getattr(chunk, "sizes", None)) for chunk in entry.chunks]
    return all(isinstance(size, torch.Size) for size in (entry.size, *(size for chunk in chunks for size in chunk)))


class _NamesOnly(InertUnpickler):
    """Unpickler that calls nothing and refuses names that extra states have no use for."""

    def find_class(self, module: str, name: str) -> type[object]:
        recipe = module == _RECIPES and name.isidentifier()  # no attribute of a class or a module
        if not recipe and (module, name) not in _OF_EXTRA_STATES | _RECIPE_NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def load_without_code() -> None:
    """Let torch and Megatron-Core load checkpoints without executing code that a file of them names.

    Torch's reader unpickles the index, and its planner loads objects, with everything that pickle can do; Megatron-Core
    has no planner or reader of its own for either. An index holds the names that :class:`IndexUnpickler` knows, objects
    what ``torch.load(weights_only=True)`` loads. Transformer Engine unpickles extra states, whose tensors torch loads
    with any code in them before Megatron-Core 0.19; :func:`refuse_code` checks these. A variable of the environment
    that lets ``torch.load`` execute code by default is removed, since Megatron-Core calls it so.
    """
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    replace: tuple[tuple[Any, str, object], ...] = (
        (filesystem, "pickle", types.SimpleNamespace(**{**vars(pickle), "load": load_index})),
        (default_planner.DefaultLoadPlanner, "load_bytes", _load_object),
        (torch.storage, "_load_from_bytes", _load_tensors),
    )
    for owner, name, replacement in replace:
        setattr(owner, name, replacement)


def refuse_code(extra_states: Mapping[str, object]) -> None:
    """Check that extra states of layers name nothing but tensors, containers and recipes.

    Args:
        extra_states: by key of a state dict: uint8 tensors or ``BytesIO`` of Transformer Engine; others have no pickle.

    Raises:
        ValueError: a state names something else, or is damaged.
    """
    for key, state in extra_states.items():
        if isinstance(state, Tensor):
            content = state.detach().cpu().numpy().tobytes()
        elif isinstance(state, io.BytesIO):
            content = b""  # loaded by torch.load, which executes nothing
        else:
            continue
        if not content:
            continue
        try:
            _NamesOnly(io.BytesIO(content)).load()
        except Exception as error:  # a pickle can fail in any way
            raise ValueError(f"{key} is no state of a layer: {error}") from None


def _load_object(planner: default_planner.DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    """Load an object as torch's planner does, which allows any code."""
    name = read_item.dest_index.fqn
    try:
        content = torch.load(value, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name} holds more than tensors, numbers, texts, lists and dicts ({reason})") from None
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[name], content)
    else:
        planner.state_dict[name] = content


def _load_tensors(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


# pickles of tensors go on naming torch's function
_load_tensors.__module__, _load_tensors.__qualname__ = "torch.storage", "_load_from_bytes"
