"""Names of special tokens in text."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mft_megatron.data.tokenizers.tokenizer import SpecialToken, Tokenizer

Span = tuple[int, int]  # index of the first character, and of the one after the last


class Name(NamedTuple):
    """An occurrence of the name of a special token in a text: ``text[start:end]``."""

    start: int
    end: int
    text: str


def names_of_text(tokenizer: "Tokenizer", within: Sequence[str] | None = None) -> frozenset[str]:
    """Names of special tokens that are ordinary text where they are tokenised like the content of a turn.

    A tokenizer also makes some tokens, often ``<think>``, of ordinary text. One character is never broken up.

    Args:
        tokenizer: of the data set.
        within: only names in these texts; ``None``: all.
    """
    special = tokenizer.special_tokens
    names = [name for name in special if len(name) > 1 and (within is None or any(name in text for text in within))]
    ids = tokenizer.encode_batch(names) if names else []
    return frozenset(name for name, found in zip(names, ids, strict=True) if found != [special[name].id])


@functools.lru_cache(maxsize=16)
def names_pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    """Compile a pattern that matches any of some names, the longest that fits."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def names_in(text: str, special_tokens: "Mapping[str, SpecialToken]") -> Iterator[Name]:
    """Find the names of special tokens in a text, from its beginning."""
    return (Name(*match.span(), match.group()) for match in names_pattern(tuple(special_tokens)).finditer(text))


def common_prefix(one: str, other: str) -> int:
    """Count the characters with which both texts begin."""
    same, most = 0, min(len(one), len(other))
    while same < most:
        middle = (same + most + 1) // 2
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            most = middle - 1
    return same
