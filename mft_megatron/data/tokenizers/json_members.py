"""The small members of a large JSON object, read without its large one.

A ``tokenizer.json`` is a few hundred bytes of settings and a vocabulary of many megabytes, which the tokenizer's
library reads by itself.
"""

import json
import re
from typing import Any

_BLANK = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def members_before(text: str, last: str, start: int = 0) -> tuple[dict[str, Any], int] | None:
    """Read the members of an object that are written before one of them.

    Args:
        text: that holds the object.
        last: name of the member at which reading stops.
        start: index in ``text`` of the object.

    Returns:
        members: by name.
        value: index in ``text`` of the value of ``last``.
        ``None``: there is no such object at ``start``, or it has no such member.
    """
    members: dict[str, Any] = {}
    position, mark = start, "{"
    try:
        while True:
            position = _after(text, position, mark)
            name, position = _DECODER.raw_decode(text, position)
            position = _after(text, position, ":")
            if name == last:
                return members, position
            members[name], position = _DECODER.raw_decode(text, position)
            mark = ","
    except ValueError:
        return None


def _after(text: str, position: int, mark: str) -> int:
    """Index of what follows a punctuation mark, with or without blanks on both sides.

    Raises:
        ValueError: there is another character.
    """
    position = _end_of_blank(text, position)
    if text[position : position + 1] != mark:
        raise ValueError(f"no {mark} at {position}")
    return _end_of_blank(text, position + 1)


def _end_of_blank(text: str, position: int) -> int:
    blank = _BLANK.match(text, position)
    return position if blank is None else blank.end()
