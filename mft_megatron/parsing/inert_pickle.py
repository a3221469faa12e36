"""Unpickle files from anywhere without executing any code that they name.

A pickle names functions and classes to call. Here each name stands for the same inert class, which stores its arguments
and does nothing.
"""

import pickle


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

    def __call__(self, *args: object) -> "Inert":
        """Store the arguments of a call; pickle looks up a nested name by calling ``getattr``."""
        return Inert(self, *args)

    def __setitem__(self, key: object, value: object) -> None:
        """Ignore an item of an unknown kind of dict."""

    def append(self, value: object) -> None:
        """Ignore an item of an unknown kind of list."""

    def extend(self, values: object) -> None:
        """Ignore items of an unknown kind of list."""

    def __repr__(self) -> str:
        """Name and arguments."""
        return f"{self.name}{self.args}"


class InertUnpickler(pickle.Unpickler):
    """Unpickler that answers every name with a class of :class:`Inert`; tensors have no content."""

    def find_class(self, module: str, name: str) -> type[object]:
        """Return an inert class of that name."""
        return type("Inert", (Inert,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: object) -> Inert:
        """Replace the storage of a tensor."""
        return Inert(pid)
