"""JSON objects of this project's files as dataclasses: every key is known and every value has its field's type."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


def parse_json(file: Path) -> Any:
    """Parse a file in UTF-8, whatever the locale.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def from_json(kind: type[T], content: object) -> T:
    """Make a dataclass, and those in its fields, from the values of a JSON object.

    Args:
        kind: a dataclass.
        content: decoded JSON.

    Raises:
        ValueError: a key is missing or unknown, a value has another type, or a number does not fit 64 bits; the
            message names the first one.
    """
    try:
        made = msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    problem = next(_problems(content, dataclasses.asdict(made), ""), None)  # type: ignore[call-overload]
    if problem is not None:
        raise ValueError(problem)
    return made


def _problems(content: object, known: object, where: str) -> Iterator[str]:
    """Keys of ``content`` that are not in ``known``, and numbers of more than 64 bits, with where they are."""
    if isinstance(content, Mapping) and isinstance(known, Mapping):
        for key, value in content.items():
            if key in known:
                yield from _problems(value, known[key], f"{where}{key}.")
            else:
                yield f"unknown key {where}{key}"
    elif isinstance(content, list) and isinstance(known, list | tuple):
        for index, (value, other) in enumerate(zip(content, known, strict=True)):
            yield from _problems(value, other, f"{where}{index}.")
    elif isinstance(content, int) and not -(2**63) <= content < 2**63:
        yield f"{where[:-1]} is a number of more than 64 bits"
