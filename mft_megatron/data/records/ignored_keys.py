"""Keys of ``--ignore-keys``: a record is read as if it did not have them, and they are counted."""

from collections.abc import Mapping
from typing import Any

from mft_megatron.errors import InputError

from .reading import Reading


def parse_ignored_keys(text: str | None) -> tuple[str, ...]:
    """Parse the value of ``--ignore-keys``: paths of keys, with commas between them.

    Raises:
        InputError: a path is empty or is there twice.
    """
    paths = [] if text is None else [path.strip() for path in text.split(",")]
    if "" in paths or len(set(paths)) < len(paths):
        raise InputError(f"--ignore-keys {text}: give keys with commas between them, each once: topic,messages[].topic")
    return tuple(paths)


def without_keys(record: Mapping[str, Any], paths: tuple[str, ...], reading: Reading) -> dict[str, Any]:
    """Return a record without some keys; the record itself is not changed.

    Args:
        record: one.
        paths: ``key``, or ``key[].key`` for a key of the objects in a list, or ``key.key`` for one of an object.
        reading: findings that the paths which the record has are added to.
    """
    changed: dict[str, Any] = dict(record)
    for path in paths:
        if path in changed:
            if changed.pop(path) is not None:
                reading.unread += (path,)
            continue
        steps = path.split(".")
        without, removed = _without(changed, steps)
        if removed:
            changed = without
            reading.unread += (path,)
    return changed


def _without(value: Any, steps: list[str]) -> tuple[Any, bool]:
    """Return a value without the key at the end of ``steps``, and whether it had the key with a value."""
    if not isinstance(value, dict):
        return value, False
    key, *rest = steps
    if not rest:
        return {name: inner for name, inner in value.items() if name != key}, value.get(key) is not None
    name = key.removesuffix("[]")
    inner = value.get(name)
    if name == key:
        changed, removed = _without(inner, rest)
    elif isinstance(inner, list):
        items = [_without(item, rest) for item in inner]
        changed, removed = [item for item, _ in items], any(had for _, had in items)
    else:
        return value, False
    return ({**value, name: changed} if removed else value), removed
