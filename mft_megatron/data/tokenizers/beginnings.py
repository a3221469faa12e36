"""How a tokenizer's own ``encode`` begins a text: with a BOS token, and with a space that is not in the text.

Nothing is added to a segment, because it may stand anywhere in a sample. But a server encodes a raw prompt with
``encode``, so the first segment of a raw sample begins as that does.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from .backends import Names

# ids of each text, by ``encode`` without the tokens before and after it; the flag is markup
OwnEncode = Callable[[Sequence[str], bool], list[list[int]]]


def is_space(character: str) -> bool:
    """Whether Unicode counts a character as whitespace, as the ``tokenizers`` library does; Python counts four more."""
    return character.isspace() and character not in "\x1c\x1d\x1e\x1f"


def never(first: str) -> bool:
    """No space, as in most byte-level tokenizers."""
    return False


def unless_space(first: str) -> bool:
    """A space unless the text begins with one, as transformers' Llama tokenizers do."""
    return first not in " ▁"


def unless_whitespace(first: str) -> bool:
    """A space unless the text begins with whitespace, as byte-level tokenizers with ``add_prefix_space`` do."""
    return not is_space(first)


def always(first: str) -> bool:
    """A space in any case, as SentencePiece does."""
    return True


RULES = (never, unless_space, unless_whitespace, always)
_PROBES = ("a", "1", "é", " a", "  a", "▁a", "\na", "\ta", "\u00a0a")


@dataclasses.dataclass(frozen=True)
class Beginning:
    """The beginning of the texts of one tokenizer.

    Attributes:
        ids: int32 [k], tokens before every text, mostly none or BOS.
        space: whether a space is written before a text, by its first character; ``None`` if that depends on more.
        after_tokens: such a space is also written after each special token in a text.
        names: of added tokens, beside which a tokenizer may write spaces, too.
        own: the tokenizer's own encoding.
    """

    ids: np.ndarray
    space: Callable[[str], bool] | None
    after_tokens: bool
    names: Names
    own: OwnEncode

    def text(self, text: str, markup: bool) -> str | None:
        """Return the text that has, with nothing added, the ids of ``text`` at the beginning of a sample.

        Args:
            text: not empty.
            markup: whether names of special tokens in the text become those tokens.

        Returns:
            the text; ``None`` if there is none, so that only :meth:`encode` gives the ids.
        """
        if self.space is never:
            return text
        if self.space is None or (markup and self.names.in_(text)):
            return None
        return f" {text}" if self.space(text[0]) else text

    def encode(self, text: str, markup: bool) -> np.ndarray:
        """Encode one text as the tokenizer itself does, without the tokens before and after it; int32 [tokens]."""
        return np.array(self.own([text], markup)[0], np.int32)


def space_rule(own: OwnEncode, plain: OwnEncode) -> Callable[[str], bool] | None:
    """Find the rule of :data:`RULES` with which ``plain`` gives the ids of ``own``; ``None`` if there is none.

    Args:
        own: the tokenizer's own encoding.
        plain: the same with nothing added.
    """
    expected = own(_PROBES, False)
    for rule in RULES:
        if plain([f" {text}" if rule(text[0]) else text for text in _PROBES], False) == expected:
            return rule
    return None
