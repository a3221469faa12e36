"""Fill in the middle: a text is cut in three, and the middle is written after the head and the tail around it.

::

    PSM   <prefix> head <suffix> tail <middle> middle      prefix, suffix, middle
    SPM   <prefix> <suffix> tail <middle> head middle      suffix first; as StarCoder and Megatron write it

The random numbers depend on the seed and the record's key alone, not on the order of records or the process.
"""

import dataclasses
import hashlib
import json

from mft_megatron.data.tokenizers.tokenizer import Tokenizer
from mft_megatron.errors import InputError

from .conversation import Conversation
from .segments import Segment

# names of the tokens before prefix, suffix and middle, by model
KNOWN_TOKENS = {
    "StarCoder": ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    "SantaCoder, Granite": ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    "Qwen, CodeGemma": ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    "DeepSeek": ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # the hole is where the suffix begins
    "CodeLlama": ("▁<PRE>", "▁<SUF>", "▁<MID>"),
}
SHORTEST = 3  # characters of the shortest text that is cut
_RANDOM_VALUES = 2**64  # random numbers are uniform in 0 … this - 1


@dataclasses.dataclass(frozen=True)
class Fim:
    """The fill-in-the-middle transformation of a task.

    Attributes:
        rate: probability that a record is cut.
        spm_rate: probability that a record that is cut is written as SPM instead of PSM.
        tokens: names of the tokens before prefix, suffix and middle.
        seed: of the random numbers.
        end_of_text: name of the tokenizer's end-of-text token.
    """

    rate: float
    spm_rate: float
    tokens: tuple[str, str, str]
    seed: int
    end_of_text: str

    def segments(self, conversation: Conversation, key: bytes) -> list[Segment] | None:
        """Write a record as fill-in-the-middle; ``None`` if it stays unchanged.

        In a document every token is supervised, as without the cut. In prompt and completion the cut is within the
        completion, and only the middle and the end-of-text token are supervised; the prompt stays markup and is
        tokenised separately from the completion, as without the cut. Cut points are uniform over the positions between
        characters, so a part may be empty.

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
        prompts = [Segment(turn.content, False, False, True) for turn in conversation.turns[:-1]]
        head = Segment(text[:first], conversation.document)
        middle = Segment(text[first:second], True)
        tail = Segment(text[second:], conversation.document)
        start, hole, fill = (Segment(name, conversation.document, True) for name in self.tokens)
        end = Segment(self.end_of_text, True, True)
        if spm < self.spm_rate * _RANDOM_VALUES:
            # the empty segment between head and middle keeps them from being tokenised as one text
            return [start, hole, tail, fill, *prompts, head, Segment("", not conversation.document), middle, end]
        return [start, *prompts, head, hole, tail, fill, middle, end]

    @property
    def fingerprint(self) -> str:
        """sha256 over all fields, which decide how a record is cut."""
        return hashlib.sha256(json.dumps(dataclasses.astuple(self)).encode()).hexdigest()


def make_fim(
    tokenizer: Tokenizer, rate: float, spm_rate: float = 0.5, tokens: str | None = None, seed: int = 1234
) -> Fim:
    """Make the transformation that ``--fim-rate``, ``--fim-spm-rate`` and ``--fim-tokens`` describe.

    Args:
        tokenizer: of the data set.
        rate: probability that a record is cut.
        spm_rate: probability that it is written as SPM then.
        tokens: as in :func:`fim_tokens`.
        seed: of the random numbers.

    Raises:
        InputError: a rate that is not a probability, or tokens as in :func:`fim_tokens`.
    """
    for option, value in (("--fim-rate", rate), ("--fim-spm-rate", spm_rate)):
        if not 0 <= value <= 1:
            raise InputError(f"{option} {value}: give a probability from 0 to 1")
    return Fim(rate, spm_rate, fim_tokens(tokenizer, tokens), seed, tokenizer.end_of_text)


def fim_tokens(tokenizer: Tokenizer, option_value: str | None = None) -> tuple[str, str, str]:
    """Names of the tokens before prefix, suffix and middle.

    Args:
        tokenizer: of the data set.
        option_value: the three names; ``None`` for the first set of :data:`KNOWN_TOKENS` that the tokenizer has.

    Raises:
        InputError: not three different tokens that were added to the vocabulary, or no known set is in it.
    """
    if option_value is None:
        for known in KNOWN_TOKENS.values():
            if all(tokenizer.token_id(name) is not None for name in known):
                return known
        raise InputError(
            f"--fim-rate: the tokenizer has none of the known sets of tokens ({'; '.join(KNOWN_TOKENS)}); name its own "
            "with --fim-tokens PREFIX,SUFFIX,MIDDLE"
        )
    names = option_value.split(",")
    if len(set(names)) != 3 or len(names) != 3:
        raise InputError(f"--fim-tokens {option_value}: give three different tokens, PREFIX,SUFFIX,MIDDLE")
    for name in names:
        if tokenizer.token_id(name) is None:
            raise InputError(f"--fim-tokens {option_value}: the tokenizer has no token {name!r}")
        if name not in tokenizer.special_tokens and not any(name in known for known in KNOWN_TOKENS.values()):
            raise InputError(
                f"--fim-tokens {option_value}: {name!r} is ordinary text to the tokenizer, so it also occurs in texts; "
                "give tokens that were added for this"
            )
    prefix, suffix, middle = names
    return prefix, suffix, middle
