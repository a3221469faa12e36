"""Splitting a text that is too large for a tokenizer, at positions where that does not change its ids.

The ``tokenizers`` library needs up to 200 bytes of memory for each character of a text that it encodes. A position is
taken as a border only after a test: the text on both sides, encoded as one, must give the same ids as each side alone.
A stretch without such a position, for example a single endless word, stays whole.
"""

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

LARGE = 1 << 19  # characters; longer texts are split
PART = 1 << 18  # characters of a part, which then extends to the next border
TESTED = 1024  # characters on each side of a border that are encoded for the test
_SEARCHED = 1 << 16  # characters that are searched for a border at a time
_TRIED = 4  # positions of each kind that are tested among them

# where tokens rarely cross: before a line, before a space between words, between words and other characters
_BORDERS = tuple(map(re.compile, (r"(?<=\n)(?=\S)", r"(?<=\S)(?= \S)", r"\b")))

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]


def split_text(text: str, encode: Encode) -> Iterator[str]:
    """Split a text into parts whose concatenated ids are its ids; yield the text itself if it is not large.

    Args:
        text: of any length.
        encode: ids of each of several texts, by the tokenizer that the parts are for.
    """
    start = 0
    if len(text) > LARGE:
        while (border := _next_border(text, start + PART, encode)) is not None:
            yield text[start:border]
            start = border
    yield text[start:] if start else text


def _next_border(text: str, start: int, encode: Encode) -> int | None:
    """Find the next border at or after ``start``; ``None`` also if only a small rest would follow."""
    for first in range(start, len(text) - PART // 2, _SEARCHED):
        for pattern in _BORDERS:
            matches = pattern.finditer(text, first, min(first + _SEARCHED, len(text)))
            for match, _ in zip(matches, range(_TRIED), strict=False):
                if _keeps_ids(text, match.start(), encode):
                    return match.start()
    return None


def _keeps_ids(text: str, border: int, encode: Encode) -> bool:
    before, after = text[max(border - TESTED, 0) : border], text[border : border + TESTED]
    whole, *parts = encode([before + after, before, after])
    return np.array_equal(whole, np.concatenate(parts))
