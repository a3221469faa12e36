"""Parsing a line of a file as a record, with the usual cause where it is not JSON."""

import json
from typing import Any

import orjson

from .conversation import RecordError
from .json_values import json_fault

# how files begin that are not text in UTF-8
_OTHER_BEGINNINGS = {
    b"\x1f\x8b": "; the file is compressed, give its name the ending .gz",
    b"\x28\xb5\x2f\xfd": "; the file is compressed, give its name the ending .zst",
    b"\xff\xfe": "; the file is UTF-16, save it as UTF-8",
    b"\xfe\xff": "; the file is UTF-16, save it as UTF-8",
}


def parse_record(line: Any) -> Any:
    """Parse a line of JSON; return a row of a table as it is.

    Raises:
        RecordError: the line is not JSON.
    """
    if not isinstance(line, bytes):
        return line
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        pass  # json accepts large numbers and NaN, too, and its messages are more precise
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        cause = next((cause for start, cause in _OTHER_BEGINNINGS.items() if line.startswith(start)), "")
        raise RecordError("invalid_utf8", f"not UTF-8 (byte {error.start} of the line){cause}") from None
    except (RecursionError, ValueError) as error:
        raise RecordError("invalid_json", f"not JSON{json_fault(error)}{_likely_cause(line)}") from None


def _likely_cause(line: bytes) -> str:
    """Likely cause of a line that is not JSON; empty where there is none."""
    if b"\r" in line.strip():
        return "; lines end in carriage returns alone here, write line feeds"
    if line.lstrip()[:1] == b"[":
        return "; write one record a line, or name the file .json"
    if line.rstrip()[-1:] in (b"{", b"[", b",", b":"):
        return "; a record is one line, or one item of an array in a .json file"
    return "" if line.lstrip()[:1] == b"{" else "; a record is a JSON object"
