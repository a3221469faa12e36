"""The library that tokenises texts: the reference, or a fast backend that has proved to give the same ids.

The reference is the ``tokenizers`` library for a Hugging Face folder and ``sentencepiece`` for its models. gigatoken is
about forty times as fast, but it is another program, so its ids are compared with the reference's: for fixed hard texts
when the tokenizer is opened, for the first texts that a process encodes, and after that for a sample of the texts. The
sample is chosen by content, so a text is compared in every run or in none. Texts with the name of an added token always
go to the reference, which knows when a name is a token.
"""

import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

# the first texts of a process are all compared, up to these limits; then one of so many
FIRST_TEXTS = 64
FIRST_CHARACTERS = 1 << 20
SAMPLED_ONE_IN = 256
# characters of each end of a text that decide whether it is in the sample
_END = 64

HARD_TEXTS = (
    *("", " ", "  ", "\n", "\n\n\n", "\r\n\r\n", "\t\t", "\0", "a\0b\0\0", " " * 300, "\n" * 300, "a" * 5000),
    "if x:\n\treturn  1\r\n\r\n    # done   \n",
    " -> a_b(c)[0]; __init__ += 'x'",
    "I'm you're WE'LL they'd can'T it's 'ſ 's'S don''t",
    "1 12 123 1234 12345.678e-9 0xFFab 1_000 ½ ① Ⅳ ٣٤ 一二三 x2y3",
    "naïve café cafe\u0301 Ångström A\u030angstro\u0308m o\u0323\u0302 q\u0307\u0323 \u0301start",
    "Ελληνικά русский עברית العربية हिन्दी ไทย 한국어 \u1112\u1161\u11ab 漢字かな交じり文 ｶﾀｶﾅ",
    "👍🏽 👩‍👩‍👧‍👦 🇩🇪🇫🇷 ❤️ 𝔘𝔫𝔦 \U000e0041 \U0010ffff",
    "\u00a0a\u2003b\u3000c\u200bd\ufeffe\u2028f\u2029g\u0085h\u001ci\u180ej\u202fk",
    "İıKſßẞﬁǅ ΑΣ ας DŽ",
    "..., ?!? --- === /* */ // \\\\ \"\"\" ''' `` <> <| |> </ /> ~~ ^^ $$ %d {{}} @@ ##\n##",
    "▁a ▁▁ b▁c <0x41> <unk> Ġa Ċ",
    "a b  c   d    e     f \n g  \n  h\n\n  i\t \tj \r k",
    "".join(map(chr, range(256))),
    "".join(map(chr, range(256, 1024))),
    " ".join(map(chr, range(33, 700))),
    *(chr(code) for code in (*range(1, 256), 0x7FF, 0x800, 0xFFFD, 0xFFFF, 0x10000, 0x10FFFF)),
)


class BackendMismatch(Exception):  # noqa: N818
    """The fast backend tokenises a text otherwise than the reference; the message names file and line."""


class BackendError(Exception):
    """The fast backend cannot be used with a tokenizer; the message is words that follow "because"."""


class DifferenceError(Exception):
    """The fast backend and the reference give different ids for a text.

    Attributes:
        position: index of the text among those to encode.
    """

    def __init__(self, position: int, text: str):
        super().__init__(f"{shortened(text)} is tokenised differently")
        self.position = position


class FastBackend(NamedTuple):
    """A fast backend.

    Attributes:
        name: of the backend.
        encode: returns the ids of one text, an integer array [tokens].
        excluded: pattern of texts that it must not get.
    """

    name: str
    encode: Callable[[str], np.ndarray]
    excluded: re.Pattern[str] | None = None


# Ids of each text by the reference, int32 [tokens]. The flag is markup: whether names of special tokens in the texts
# become those tokens.
Reference = Callable[[Sequence[str], bool], list[np.ndarray]]


class CheckedBackend:
    """A fast backend that is compared with the reference on some of the texts."""

    def __init__(self, fast: FastBackend, reference: Reference, names: Iterable[str]):
        """Choose the two backends.

        Args:
            fast: that encodes most texts.
            reference: that it is compared with.
            names: of added tokens; texts that hold one of them go to the reference.
        """
        self._fast = fast
        self._reference = reference
        self._names = Names(names)
        self._first, self._first_characters = FIRST_TEXTS, FIRST_CHARACTERS

    def prove(self, texts: Sequence[str] = HARD_TEXTS) -> None:
        """Compare all of ``texts``.

        Raises:
            BackendError: the ids of one of them differ.
        """
        texts = [text for text in texts if not self._is_for_the_reference(text)]
        try:
            self._compare(texts, range(len(texts)), self._encode_fast(texts))
        except DifferenceError as difference:
            raise BackendError(f"it is not equal to the reference: {difference}") from None

    def encode(self, texts: Sequence[str], markup: bool) -> list[np.ndarray]:
        """Encode texts; nothing is added to them.

        Args:
            texts: to encode.
            markup: whether names of special tokens in the texts become those tokens.

        Returns:
            ids of each text, an integer array [tokens].

        Raises:
            DifferenceError: a text that was compared has different ids.
        """
        referred = set()
        if self._names.perhaps_in("\n".join(texts)) or self._fast.excluded is not None:
            referred = {index for index, text in enumerate(texts) if self._is_for_the_reference(text)}
        indices = [index for index in range(len(texts)) if index not in referred] if referred else range(len(texts))
        fast_texts = [texts[index] for index in indices] if referred else texts
        fast_ids = self._encode_fast(fast_texts)
        compared = [index for index, text in enumerate(fast_texts) if self._is_first(text) or _is_sampled(text)]
        try:
            self._compare(fast_texts, compared, fast_ids)
        except DifferenceError as difference:
            difference.position = indices[difference.position]
            raise
        if not referred:
            return fast_ids
        ordered = sorted(referred)
        reference_ids = self._reference([texts[index] for index in ordered], markup)
        ids = dict(zip(indices, fast_ids, strict=True)) | dict(zip(ordered, reference_ids, strict=True))
        return [ids[index] for index in range(len(texts))]

    def _is_first(self, text: str) -> bool:
        if self._first <= 0 or self._first_characters <= 0:
            return False
        self._first -= 1
        self._first_characters -= len(text)
        return True

    def _is_for_the_reference(self, text: str) -> bool:
        excluded = self._fast.excluded
        if excluded is not None and not text.isascii() and excluded.search(text) is not None:
            return True
        return self._names.in_(text)

    def _encode_fast(self, texts: Sequence[str]) -> list[np.ndarray]:
        encode = self._fast.encode
        ids: list[np.ndarray] = []
        try:
            for text in texts:
                ids.append(encode(text))
        except BaseException as error:
            if not is_backend_fault(error):
                raise
            raise DifferenceError(len(ids), text) from None
        return ids

    def _compare(self, texts: Sequence[str], indices: Sequence[int], ids: list[np.ndarray]) -> None:
        if not indices:
            return
        expected = self._reference([texts[index] for index in indices], False)
        for index, expected_ids in zip(indices, expected, strict=True):
            if not np.array_equal(ids[index], expected_ids):
                raise DifferenceError(index, texts[index])


class Names:
    """Quick test whether a text holds any of many names: most begin alike, and few texts hold that beginning."""

    def __init__(self, names: Iterable[str]):
        """Prepare for ``names``."""
        # some tokenizers write a space as ▁ before they look for names
        spelled = {spelling for name in names if name for spelling in (name, name.replace("▁", " "))}
        by_first_character: dict[str, list[str]] = {}
        for name in spelled:
            by_first_character.setdefault(name[0], []).append(name)
        self._stems = [_common_start(min(alike), max(alike)) for alike in by_first_character.values()]
        self._pattern = re.compile("|".join(map(re.escape, sorted(spelled))))

    def perhaps_in(self, text: str) -> bool:
        """Whether the beginning of a name is in a text."""
        return any(stem in text for stem in self._stems)

    def in_(self, text: str) -> bool:
        """Whether a name is in a text."""
        return self.perhaps_in(text) and self._pattern.search(text) is not None


def _common_start(one: str, other: str) -> str:
    for length, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return one[:length]
    return min(one, other, key=len)


def _is_sampled(text: str) -> bool:
    # the length and both ends of a long text tell texts apart as well as all of it
    key = text if len(text) <= 2 * _END else f"{len(text)} {text[:_END]}{text[-_END:]}"
    return zlib.crc32(key.encode("utf-8", "surrogatepass")) % SAMPLED_ONE_IN == 0


def is_backend_fault(error: BaseException) -> bool:
    """Whether an error comes from the backend itself; a panic of its Rust code is not an ``Exception``."""
    return not isinstance(error, KeyboardInterrupt | SystemExit | MemoryError)


def shortened(text: str, longest: int = 60) -> str:
    """Quote a text for a message, cut to at most ``longest`` characters."""
    return repr(text if len(text) <= longest else text[:longest] + "…")
