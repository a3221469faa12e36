"""The content of a Megatron checkpoint's ``common.pt``, read without executing any code in it.

A pickle names functions and classes to call. Here each name stands for the same inert class, which stores its arguments
and does nothing. So files from anywhere can be read; tensors in them are not.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

from mft_megatron.errors import InputError

COMMON = "common.pt"


class Inert:
    """An object of a pickle that is no number, text, list, tuple or dict.

    Attributes:
        name: full name of its class or function.
        args: arguments that it was called with.
        state: attributes that it was given.
    """

    name = ""
    args: tuple[object, ...]
    state: dict[str, object]

    # attributes go through __dict__, as pickle may set others of the same names
    def __new__(cls, *args: object, **kwargs: object) -> "Inert":
        """Store the arguments."""
        self = object.__new__(cls)
        self.__dict__["args"], self.__dict__["state"] = args, {}
        return self

    def __init__(self, *args: object, **kwargs: object):
        """Do nothing: :meth:`__new__` has stored the arguments."""

    def __setstate__(self, state: object) -> None:
        """Store the attributes."""
        self.__dict__["state"] = state if isinstance(state, dict) else {}

    def __setitem__(self, key: object, value: object) -> None:
        """Ignore an item of an unknown kind of dict."""

    def append(self, value: object) -> None:
        """Ignore an item of an unknown kind of list."""

    def extend(self, values: object) -> None:
        """Ignore items of an unknown kind of list."""

    def __repr__(self) -> str:
        """Name and arguments."""
        return f"{self.name}{self.args}"


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[Inert]:
        return type("Inert", (Inert,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: object) -> Inert:
        """Replace the storage of a tensor."""
        return Inert(pid)


def read_common(path: Path) -> Mapping[str, object]:
    """Read ``common.pt`` in the checkpoint folder ``path``.

    Returns:
        its content, empty if there is no such file. Numbers, texts, lists, tuples and dicts are themselves; everything
        else is an :class:`Inert`.

    Raises:
        InputError: the file is damaged, or was not written by torch.
    """
    file = path / COMMON
    if not file.is_file():
        return {}
    try:
        with zipfile.ZipFile(file) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as stream:
                content = _Unpickler(stream).load()
    except Exception as error:  # a pickle can fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{file}: cannot be read ({reason}); the checkpoint is damaged") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds no dict; it is not a checkpoint of Megatron-LM")
    return content


def read_args(common: Mapping[str, object]) -> Mapping[str, object] | None:
    """Arguments of the run that wrote a checkpoint, an ``argparse.Namespace``; ``None`` if there are none."""
    args = common.get("args")
    return args.state if isinstance(args, Inert) and args.name == "argparse.Namespace" else None
