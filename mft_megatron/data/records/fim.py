"""Fill in the middle: a document is cut in three, and the middle is asked for after what surrounds it.

::

    PSM   <prefix> head <suffix> tail <middle> middle      prefix, suffix, middle
    SPM   <prefix> <suffix> tail <middle> head middle      suffix first; as StarCoder and Megatron write it

What is drawn depends on the seed and the record's key alone, not on the order or the process.
"""

import dataclasses
import hashlib
import json

from mft_megatron.data.tokenizers.tokenizer import Tokenizer
from mft_megatron.errors import InputError

from .conversation import Conversation
from .segments import Segment

# names of the tokens before prefix, suffix and middle, by the models that have them
KNOWN_TOKENS = {
    "StarCoder": ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    "SantaCoder, Granite": ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    "Qwen, CodeGemma": ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    "DeepSeek": ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # the hole stands where the suffix begins
    "CodeLlama": ("▁<PRE>", "▁<SUF>", "▁<MID>"),
}
SHORTEST = 3  # characters that can be cut in three
_DRAWS = 2**64


@dataclasses.dataclass(frozen=True)
class Fim:
    """``rate``: probability that a record is cut; ``spm_rate``: that one which is cut is written as SPM. ``tokens``:
    names of the tokens before prefix, suffix and middle. ``end_of_text``: the tokenizer's."""

    rate: float
    spm_rate: float
    tokens: tuple[str, str, str]
    seed: int
    end_of_text: str

    def segments(self, conversation: Conversation, key: bytes) -> list[Segment] | None:
        """The record cut for filling in, or ``None``: it stays as it is.

        Of a document every token is supervised, as it is without the cut. Of prompt and completion the cut lies within
        the completion, and the middle and the end-of-text token are supervised; the prompt stays markup and is cut into
        tokens apart from what follows it, as it is without the cut. Cut points are drawn evenly among the places
        between characters, so that a part may be empty.

        Args:
            conversation: chats, and texts of less than :data:`SHORTEST` characters to cut, stay as they are.
            key: tells the record from all others of the data set.
        """
        text = conversation.turns[-1].content
        if not conversation.raw or not conversation.turns[-1].learn or len(text) < SHORTEST:
            return None
        digest = hashlib.sha256(b"%d/%b" % (self.seed, key)).digest()
        chosen, spm, *cuts = (int.from_bytes(digest[place : place + 8], "little") for place in range(0, 32, 8))
        if not chosen < self.rate * _DRAWS:
            return None
        first, second = sorted(cut * (len(text) + 1) // _DRAWS for cut in cuts)
        prompts = [Segment(turn.content, False, False, True) for turn in conversation.turns[:-1]]
        head = Segment(text[:first], conversation.document)
        middle = Segment(text[first:second], True)
        tail = Segment(text[second:], conversation.document)
        start, hole, fill = (Segment(name, conversation.document, True) for name in self.tokens)
        end = Segment(self.end_of_text, True, True)
        if spm < self.spm_rate * _DRAWS:
            # the empty text keeps the tokenizer from joining what stands on both sides of the cut
            return [start, hole, tail, fill, *prompts, head, Segment("", not conversation.document), middle, end]
        return [start, *prompts, head, hole, tail, fill, middle, end]

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides how a record is cut."""
        return hashlib.sha256(json.dumps(dataclasses.astuple(self)).encode()).hexdigest()


def fim(tokenizer: Tokenizer, rate: float, spm_rate: float = 0.5, tokens: str | None = None, seed: int = 1234) -> Fim:
    """The transformation of ``--fim-rate``, ``--fim-spm-rate`` and ``--fim-tokens``.

    Raises:
        InputError: a rate that is no probability, or see :func:`fim_tokens`.
    """
    for option, value in (("--fim-rate", rate), ("--fim-spm-rate", spm_rate)):
        if not 0 <= value <= 1:
            raise InputError(f"{option} {value}: give a probability from 0 to 1")
    return Fim(rate, spm_rate, fim_tokens(tokenizer, tokens), seed, tokenizer.end_of_text)


def fim_tokens(tokenizer: Tokenizer, given: str | None = None) -> tuple[str, str, str]:
    """Names of the tokens before prefix, suffix and middle.

    Args:
        tokenizer: of the data set.
        given: the three with commas between them; ``None``: the first of :data:`KNOWN_TOKENS` that it has.

    Raises:
        InputError: not three different tokens that were added to the vocabulary, or none of the known sets is in it.
    """
    if given is None:
        for names in KNOWN_TOKENS.values():
            if all(tokenizer.token_id(name) is not None for name in names):
                return names
        raise InputError(
            f"--fim-rate: the tokenizer has none of the known sets of tokens ({'; '.join(KNOWN_TOKENS)}); name its own "
            "with --fim-tokens PREFIX,SUFFIX,MIDDLE"
        )
    names = tuple(given.split(","))
    if len(set(names)) != 3 or len(names) != 3:
        raise InputError(f"--fim-tokens {given}: give three different tokens, PREFIX,SUFFIX,MIDDLE")
    for name in names:
        if tokenizer.token_id(name) is None:
            raise InputError(f"--fim-tokens {given}: the tokenizer has no token {name!r}")
        if name not in tokenizer.special_tokens and not any(name in known for known in KNOWN_TOKENS.values()):
            raise InputError(
                f"--fim-tokens {given}: {name!r} is a piece of ordinary text to the tokenizer, so that texts have it, "
                "too; give tokens that were added for this"
            )
    return names
