"""Names of special tokens in text."""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from mft_megatron.data.tokenizers.tokenizer import SpecialToken

Span = tuple[int, int]  # index of the first character, and of the one after the last


class Name(NamedTuple):
    """An occurrence of the name of a special token in a text: ``text[start:end]``."""

    start: int
    end: int
    text: str


@functools.lru_cache(maxsize=16)
def names_pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    """Compile a pattern that matches any of some names, the longest that fits."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def names_in(text: str, special_tokens: Mapping[str, SpecialToken]) -> Iterator[Name]:
    """Find the names of special tokens in a text, from its beginning."""
    return (Name(*match.span(), match.group()) for match in names_pattern(tuple(special_tokens)).finditer(text))
