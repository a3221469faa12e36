"""Damage to files by a seed: to the bytes of any file, and to the values of JSON."""

import json
import random

# texts and numbers that parsers stumble over
VALUES = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400),
    *(0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", " ", "\x00", "\ud800", "ä" * 300, "../../etc/passwd", "/dev/zero", "{{ 1 }}", "nan", "1e9", "%s%n", "a\nb"),
    *([], [[]], {}, {"": {}}, [None], {"a": [1, {"b": None}]}),
)
MAGIC = (
    *(b"\x00", b"\xff" * 8, b"\x80\x04", b"PK\x03\x04", b"\x1f\x8b\x08", b"(\xb5/\xfd", b"PAR1"),
    *(b"{", b"[", b"\n", b'"', b"\xed\xa0\x80"),
)


def damaged(content: bytes, seed: int) -> bytes:
    """Damage a file: as JSON where it is, in half of the cases, and otherwise as bytes."""
    chance = random.Random(seed)
    if chance.random() < 0.5:
        for change in (_object, _lines):
            try:
                return change(content, chance)
            except (ValueError, RecursionError):
                continue
    return _bytes(content, chance)


def _object(content: bytes, chance: random.Random) -> bytes:
    """Change one or two values of a file that is a JSON value."""
    value = json.loads(content)
    for _ in range(chance.choice((1, 1, 2))):
        value = _changed(value, chance)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _lines(content: bytes, chance: random.Random) -> bytes:
    """Change a value in one line of a file of JSON lines."""
    lines = content.splitlines(keepends=True)
    index = chance.randrange(max(len(lines), 1))
    lines[index : index + 1] = [_object(lines[index], chance) + b"\n"]
    return b"".join(lines)


def _changed(value, chance):
    """Replace, remove, add or nest at a random place in a JSON value."""
    if isinstance(value, dict | list) and value and chance.random() < 0.85:
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        kind = chance.random()
        copy = dict(value) if isinstance(value, dict) else list(value)
        if kind < 0.15:
            del copy[key]
        elif kind < 0.25:
            if isinstance(copy, dict):
                copy[chance.choice(("more", "", "\x00", "a" * 99))] = chance.choice(VALUES)
            else:
                copy.insert(key, chance.choice(VALUES))
        else:
            copy[key] = _changed(value[key], chance)
        return copy
    if chance.random() < 0.1:
        for _ in range(chance.choice((3, 200))):
            value = [value]
        return value
    return chance.choice(VALUES)


def _bytes(content: bytes, chance: random.Random) -> bytes:
    """Flip, cut off, delete, repeat, insert or overwrite bytes, up to four times."""
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(content) + 1)
        # headers are at the beginning
        at = chance.choice((at, at % 64, at % 256))
        length = chance.choice((1, 2, 4, 8, 64, 1000))
        kind = chance.randrange(6)
        if kind == 0:
            flipped = bytes(byte ^ (1 << chance.randrange(8)) for byte in content[at : at + 1])
            content = content[:at] + flipped + content[at + 1 :]
        elif kind == 1:
            content = content[:at]
        elif kind == 2:
            content = content[:at] + content[at + length :]
        elif kind == 3:
            content = content[: at + length] + content[at:]
        elif kind == 4:
            content = content[:at] + chance.choice(MAGIC) + content[at:]
        else:
            content = content[:at] + chance.randbytes(min(length, 8)) + content[at + min(length, 8) :]
    return content
