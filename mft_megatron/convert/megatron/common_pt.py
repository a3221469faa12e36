"""What a Megatron checkpoint's ``common.pt`` says, read without running anything that stands in it.

A pickle names functions and classes to call. Here every name is answered by the same inert class, which remembers what
it was given and does nothing; so a file from anywhere can be read, and tensors in it are passed over.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

from mft_megatron.errors import InputError

COMMON = "common.pt"


class Inert:
    """Whatever a pickle makes that is no plain number, text, list or dict."""

    name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        self = object.__new__(cls)
        self.__dict__["args"], self.__dict__["state"] = args, {}
        return self

    def __init__(self, *args: Any, **kwargs: Any):
        """Nothing: what there is has been kept."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state if isinstance(state, dict) else {}

    def __setitem__(self, key: Any, value: Any) -> None:
        """An item of a dict of an unknown kind."""

    def append(self, value: Any) -> None:
        """An item of a list of an unknown kind."""

    def extend(self, values: Any) -> None:
        """Items of one."""

    def __repr__(self) -> str:
        return f"{self.name}{self.args}"


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[Inert]:
        return type("Inert", (Inert,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Inert:
        """The storage of a tensor."""
        return Inert(pid)


def read_common(path: Path) -> dict[str, Any]:
    """The content of ``common.pt`` in the checkpoint folder ``path``; empty where there is none.

    Numbers, texts, lists, tuples and dicts are as they were; everything else is an :class:`Inert`.

    Raises:
        InputError: the file is damaged, or no file of torch's.
    """
    file = path / COMMON
    if not file.is_file():
        return {}
    try:
        with zipfile.ZipFile(file) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as content:
                found = _Unpickler(content).load()
    except Exception as error:  # a pickle can fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{file}: cannot be read ({reason}); the checkpoint is damaged") from None
    if not isinstance(found, dict):
        raise InputError(f"{file}: holds no dict; it is not a checkpoint of Megatron-LM")
    return found


def read_args(common: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of the run that wrote a checkpoint, an ``argparse.Namespace``; ``None`` where there are none."""
    args = common.get("args")
    return args.state if isinstance(args, Inert) and args.name == "argparse.Namespace" else None
