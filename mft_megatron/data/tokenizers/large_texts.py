"""Texts too large for a tokenizer, cut in pieces at places where that changes nothing.

The ``tokenizers`` library takes some 150 bytes of memory for each character of a text while it cuts it. A border
between pieces is taken only after a test: the text on both sides of it, cut whole, gives the same tokens as each side
cut alone. A stretch without any such place, such as a single endless word, stays one piece.
"""

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

LARGE = 1 << 20  # characters; longer texts are cut in pieces
PIECE = 1 << 19  # characters of a piece, and as many more as it takes to the next border
TESTED = 2048  # characters on each side of a border that are tested
_SEARCHED = 1 << 16  # characters that are searched for a border at a time
_TRIED = 4  # places of each kind tried in them

# where tokens rarely straddle: before a line, before a space between words, between words and other characters
_BORDERS = tuple(map(re.compile, (r"(?<=\n)(?=\S)", r"(?<=\S)(?= \S)", r"\b")))

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]


def pieces_of(text: str, encode: Encode) -> Iterator[str]:
    """``text`` in pieces whose ids, one behind the other, are its ids; the text itself where it is not large.

    Args:
        text: of any length.
        encode: ids of each of several texts, of the tokenizer that the pieces are for.
    """
    start = 0
    if len(text) > LARGE:
        while (border := _border(text, start + PIECE, encode)) is not None:
            yield text[start:border]
            start = border
    yield text[start:] if start else text


def _border(text: str, start: int, encode: Encode) -> int | None:
    """The next place from ``start`` on where the text may be cut; none for the sake of a small rest."""
    for first in range(start, len(text) - PIECE // 2, _SEARCHED):
        for pattern in _BORDERS:
            places = pattern.finditer(text, first, min(first + _SEARCHED, len(text)))
            for place, _ in zip(places, range(_TRIED), strict=False):
                if _changes_nothing(text, place.start(), encode):
                    return place.start()
    return None


def _changes_nothing(text: str, border: int, encode: Encode) -> bool:
    before, after = text[max(border - TESTED, 0) : border], text[border : border + TESTED]
    whole, *parts = encode([before + after, before, after])
    return np.array_equal(whole, np.concatenate(parts))
