"""Fill in the middle: a text is cut in three, and the middle is written after the head and the tail around it.

::

    PSM   <prefix> head <suffix> tail <middle> middle <end>      prefix, suffix, middle
    SPM   <prefix> <suffix> tail <middle> head middle <end>      suffix first; as StarCoder and Megatron write it
          <suffix> tail <prefix> head middle <end>               as Mistral's models have it, which have no PSM

Each family of models has its own tokens, and a server stops at its own end token: :data:`FAMILIES`. The random numbers
depend on the seed and the record's key alone, not on the order of records or the process.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Literal

from mft_megatron.data.tokenizers.beginnings import never
from mft_megatron.data.tokenizers.tokenizer import Tokenizer
from mft_megatron.errors import InputError

from .conversation import Conversation
from .segments import Segment


@dataclasses.dataclass(frozen=True)
class FimFamily:
    """How models of one family are asked to fill in the middle.

    Attributes:
        tokens: names of the tokens before prefix, suffix and middle.
        end: name of the token after the middle.
        spm_rate: fraction of SPM with which the family was trained, 0 where only PSM is published.
        space: whether a space is written before the prefix, so that its first word is tokenised like any other:
            "never", "always", or "as encode": before one that is not empty, where the tokenizer's own ``encode`` begins
            a text with a space.
        without_middle: the form of SPM without the token before the middle.
    """

    tokens: tuple[str, str, str]
    end: str
    spm_rate: float = 0.5
    space: Literal["never", "always", "as encode"] = "never"
    without_middle: bool = False


# a tokenizer is of the first family whose tokens it has, the end token included if one has all four
FAMILIES = {
    "CodeLlama": FimFamily(("▁<PRE>", "▁<SUF>", "▁<MID>"), "▁<EOT>", space="always"),
    "CodeGemma": FimFamily(("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), "<|file_separator|>"),
    # the same end token for base and instruct models, whose end-of-text token differs
    "Qwen": FimFamily(("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), "<|endoftext|>", spm_rate=0.0),
    # the hole is where the suffix begins
    "DeepSeek": FimFamily(
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"), "<｜end▁of▁sentence｜>", spm_rate=0.0
    ),
    "StarCoder": FimFamily(("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), "<|endoftext|>"),
    "Codestral, Mistral": FimFamily(
        ("[PREFIX]", "[SUFFIX]", "[MIDDLE]"), "</s>", spm_rate=1.0, space="as encode", without_middle=True
    ),
    "SantaCoder, Granite": FimFamily(("<fim-prefix>", "<fim-suffix>", "<fim-middle>"), "<|endoftext|>"),
}
SHORTEST = 3  # characters of the shortest text that is cut
_RANDOM_VALUES = 2**64  # random numbers are uniform in 0 … this - 1


@dataclasses.dataclass(frozen=True)
class Fim:
    """The fill-in-the-middle transformation of a task.

    Attributes:
        rate: probability that a record is cut.
        spm_rate: probability that a record that is cut is written as SPM instead of PSM.
        family: tokens and form.
        seed: of the random numbers.
    """

    rate: float
    spm_rate: float
    family: FimFamily
    seed: int

    def segments(self, conversation: Conversation, key: bytes) -> list[Segment] | None:
        """Write a record as fill-in-the-middle; ``None`` if it stays unchanged.

        In a document every token is supervised, as without the cut. In prompt and completion the cut is within the
        completion, and only the middle and the end token are supervised; the prompt stays markup and is tokenised
        separately from the completion, as without the cut. Cut points are uniform over the positions between
        characters, so a part may be empty. The sample begins as raw text does, possibly with BOS.

        Args:
            conversation: chats, and texts with fewer than :data:`SHORTEST` characters to cut, stay unchanged.
            key: identifies the record within the data set.
        """
        text = conversation.turns[-1].content
        if not conversation.raw or not conversation.turns[-1].learn or len(text) < SHORTEST:
            return None
        digest = hashlib.sha256(b"%d/%b" % (self.seed, key)).digest()
        chosen, spm, *cuts = (int.from_bytes(digest[first : first + 8], "little") for first in range(0, 32, 8))
        if not chosen < self.rate * _RANDOM_VALUES:
            return None
        first, second = sorted(cut * (len(text) + 1) // _RANDOM_VALUES for cut in cuts)
        texts = [Segment(turn.content, False, False, True) for turn in conversation.turns[:-1]]
        texts.append(Segment(text[:first], conversation.document))
        opening = next((index for index, one in enumerate(texts) if one.text), -1)
        if self.family.space == "always" or (self.family.space == "as encode" and opening >= 0):
            texts[opening] = texts[opening]._replace(text=f" {texts[opening].text}")
        middle = Segment(text[first:second], True)
        tail = Segment(text[second:], conversation.document)
        start, hole, fill = (Segment(name, conversation.document, True) for name in self.family.tokens)
        end = Segment(self.family.end, True, True)
        if spm < self.spm_rate * _RANDOM_VALUES:
            before = [hole, tail, start] if self.family.without_middle else [start, hole, tail, fill]
            # the empty segment between head and middle keeps them from being tokenised as one text
            written = [*before, *texts, Segment("", not conversation.document), middle, end]
        else:
            written = [start, *texts, hole, tail, fill, middle, end]
        return [written[0]._replace(begins=True), *written[1:]]


def make_fim(
    tokenizer: Tokenizer, rate: float, spm_rate: float | None = None, tokens: str | None = None, seed: int = 1234
) -> Fim:
    """Make the transformation that ``--fim-rate``, ``--fim-spm-rate`` and ``--fim-tokens`` describe.

    Args:
        tokenizer: of the data set.
        rate: probability that a record is cut.
        spm_rate: probability that it is written as SPM then; ``None`` for the family's own.
        tokens: as in :func:`fim_family`.
        seed: of the random numbers.

    Raises:
        InputError: a rate that is not a probability, or tokens as in :func:`fim_family`.
    """
    family = fim_family(tokenizer, tokens)
    if family.without_middle and spm_rate not in (None, family.spm_rate):
        raise InputError(f"--fim-spm-rate {spm_rate}: models with {family.tokens[1]} have SPM alone; leave it out")
    if family.space == "as encode" and tokenizer.beginning.space is never:
        family = dataclasses.replace(family, space="never")
    spm_rate = family.spm_rate if spm_rate is None else spm_rate
    for option, value in (("--fim-rate", rate), ("--fim-spm-rate", spm_rate)):
        if not 0 <= value <= 1:
            raise InputError(f"{option} {value}: give a probability from 0 to 1")
    return Fim(rate, spm_rate, family, seed)


def fim_family(tokenizer: Tokenizer, option_value: str | None = None) -> FimFamily:
    """Find the family of a tokenizer, whose end token is the end of text where the vocabulary has no other.

    Args:
        tokenizer: of the data set.
        option_value: names of the tokens before prefix, suffix and middle, possibly those of a family; ``None`` for the
            first family of :data:`FAMILIES` that the tokenizer has the tokens of.

    Raises:
        InputError: not three different tokens that were added to the vocabulary, or no known set is in it.
    """
    if option_value is None:
        known = next(_families_of(tokenizer), None)
        if known is None:
            raise InputError(
                f"--fim-rate: the tokenizer has none of the known sets of tokens ({'; '.join(FAMILIES)}); name its own "
                "with --fim-tokens PREFIX,SUFFIX,MIDDLE"
            )
        return known
    tokens = _named_tokens(tokenizer, option_value)
    same = (family for family in _families_of(tokenizer) if family.tokens == tokens)
    return next(same, FimFamily(tokens, tokenizer.end_of_text))


def _families_of(tokenizer: Tokenizer) -> Iterator[FimFamily]:
    """Iterate over the families that a tokenizer has the tokens of, at first those with their end token."""
    found = [f for f in FAMILIES.values() if all(tokenizer.token_id(name) is not None for name in f.tokens)]
    yield from (family for family in found if tokenizer.token_id(family.end) is not None)
    yield from (dataclasses.replace(family, end=tokenizer.end_of_text) for family in found)


def _named_tokens(tokenizer: Tokenizer, option_value: str) -> tuple[str, str, str]:
    names = option_value.split(",")
    if len(set(names)) != 3 or len(names) != 3:
        raise InputError(f"--fim-tokens {option_value}: give three different tokens, PREFIX,SUFFIX,MIDDLE")
    for name in names:
        if tokenizer.token_id(name) is None:
            raise InputError(f"--fim-tokens {option_value}: the tokenizer has no token {name!r}")
        if name not in tokenizer.special_tokens and not any(name in known.tokens for known in FAMILIES.values()):
            raise InputError(
                f"--fim-tokens {option_value}: {name!r} is ordinary text to the tokenizer, so it also occurs in texts; "
                "give tokens that were added for this"
            )
    prefix, suffix, middle = names
    return prefix, suffix, middle
