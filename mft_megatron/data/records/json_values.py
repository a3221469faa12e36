"""Checked reading of the JSON values in a record; every error names the value's position in the record."""

import collections
import json
import sys
from collections.abc import Mapping
from typing import Any

from .conversation import RecordError


def require_text(value: object, name: str) -> str:
    """Return ``value`` if it is text that can be encoded.

    Args:
        value: from the record.
        name: its position in the record, for the error message.

    Raises:
        RecordError: it is not a string, or it holds half a surrogate pair.
    """
    if not isinstance(value, str):
        raise RecordError("wrong_type", f"{name} must be a string, not {type(value).__name__}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RecordError("invalid_text", f"{name} holds half a surrogate pair (character {error.start})") from None
    return value


def optional_list(record: Mapping[str, object], name: str) -> list[object]:
    """Return the list under a key; an empty one if the key is absent or null.

    Raises:
        RecordError: the value is not a list.
    """
    value = record.get(name)
    if value is not None and not isinstance(value, list):
        raise RecordError("wrong_type", f"{name} must be a list, not {type(value).__name__}")
    return value or []


def parse_json(text: str, name: str, reason: str) -> object:
    """Parse a value that the record holds as JSON text.

    Args:
        text: the JSON.
        name: position in the record, for the error message.
        reason: name that the record is counted under if the text is not JSON.

    Raises:
        RecordError: it is not JSON.
    """
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        raise RecordError(reason, f"{name} is not JSON{json_fault(error)}") from None


# records longer than this are not looked at for repeated keys, as they would be in memory once more
_LONGEST_CHECKED = 1 << 20


def refuse_repeated_keys(line: Any) -> None:
    """Refuse a record of which an object has a key twice: JSON's readers take the last one without a word.

    Args:
        line: the record as JSON; one that is long, is not JSON or is a row of a table passes.

    Raises:
        RecordError: a key is in an object twice.
    """
    if not isinstance(line, bytes) or len(line) > _LONGEST_CHECKED:
        return
    repeated: list[str] = []

    def look(pairs: list[tuple[str, object]]) -> None:
        if len(dict(pairs)) < len(pairs):
            repeated.append(collections.Counter(key for key, _ in pairs).most_common(1)[0][0])

    try:
        json.loads(line, object_pairs_hook=look)
    except (RecursionError, ValueError):
        return  # the reader's error says more
    if repeated:
        raise RecordError("repeated_key", f"the key {repeated[0][:40]!r} is in an object twice; keep one of the two")


def json_fault(error: RecursionError | ValueError) -> str:
    """Return the words that follow "not JSON" in a one-line message about an error of ``json.loads``."""
    if isinstance(error, json.JSONDecodeError):
        return f" ({error.msg}, at character {error.pos + 1})"
    if isinstance(error, RecursionError):
        return " that can be read (nested too deeply)"
    return f" that can be read (a whole number of more than {sys.get_int_max_str_digits()} digits)"


def require_json(value: object, name: str) -> None:
    """Refuse a value that a chat template could not write.

    Raises:
        RecordError: it has no JSON form, holds half a surrogate pair or is nested too deeply.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RecordError("invalid_text", f"{name} holds half a surrogate pair") from None
    except RecursionError:
        raise RecordError("wrong_type", f"{name} is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise RecordError("wrong_type", f"{name} holds a value that JSON cannot express ({error})") from None
