"""The interface of a configuration entry, and the checks of values that entries share."""

from collections.abc import Mapping
from typing import Protocol, TypeAlias

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.errors import InputError

Config: TypeAlias = Mapping[str, object]
# values of NetworkArguments' fields by name
Fields: TypeAlias = dict[str, object]


class Entry(Protocol):
    """One or more entries of ``config.json`` that together set some fields of an architecture.

    A published ``config.json`` leaves out what has the default of its family's configuration in transformers, so
    entries carry those defaults.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """Names in ``config.json`` that the entry reads."""

    def read(self, config: Config) -> Fields:
        """Read fields of ``NetworkArguments``.

        Raises:
            InputError: an entry is missing, damaged, or cannot be expressed.
        """

    def write(self, architecture: NetworkArguments) -> dict[str, object]:
        """Write the entries of ``config.json``: the inverse of :meth:`read`."""


class Required:
    """The default of an entry that must be present."""


REQUIRED = Required()


def whole_number(config: Config, name: str, default: int | Required = REQUIRED, at_least: int = 1) -> int:
    """Read a whole number from ``config.json``.

    Args:
        default: value of a missing entry.

    Raises:
        InputError: the entry is missing without a default, not a whole number, or too small.
    """
    value = _present(config, name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; it must be a whole number")
    if value < at_least:
        raise InputError(f"{name} is {value!r}, which is too small")
    return value


def whole_number_or_null(config: Config, name: str, default: int | None) -> int | None:
    """Read a positive whole number that may be null.

    Args:
        default: value of a missing entry.

    Raises:
        InputError: the entry is not a whole number, or too small.
    """
    if config.get(name, default) is None:
        return None
    return whole_number(config, name, REQUIRED if default is None else default)


def real_number(config: Config, name: str, default: float | Required = REQUIRED) -> float:
    """Read a number above 0 from ``config.json``.

    Args:
        default: value of a missing entry.

    Raises:
        InputError: the entry is missing without a default, not a number, or not above 0.
    """
    value = _present(config, name, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; it must be a number")
    if value <= 0:
        raise InputError(f"{name} is {value!r}, which is too small")
    return float(value)


def flag(config: Config, name: str, default: bool) -> bool:
    """Read an entry that is true or false from ``config.json``.

    Args:
        default: value of a missing entry.

    Raises:
        InputError: the entry is neither.
    """
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; it must be true or false")
    return value


def _present(config: Config, name: str, default: object) -> object:
    value = config.get(name, default)
    if value is REQUIRED:
        raise InputError(f"no {name}")
    return value
