"""The library that cuts texts into tokens: the reference, or gigatoken where it has proved to do the same.

The reference is the ``tokenizers`` library for a Hugging Face folder and ``sentencepiece`` for its models. gigatoken is
some forty times as fast, and another program: what it makes of a text is taken only as far as it has been compared.

- It reads byte-level BPE with the pre-tokenizers of well-known models (GPT-2, Llama 3, Qwen 2, GPT-4o, …) and BPE with
  bytes as fallback (Llama 2, Mistral, Gemma), as ``tokenizer.json`` or as SentencePiece model. It refuses unigram and
  WordPiece models, other pre-tokenizers (also StarCoder's and DeepSeek-Coder's) and other normalisers than NFC.
- Over some 6000 texts of random Unicode, mutated code and hard cases each, ids are equal for all of these, but for NFC
  and the character maps of SentencePiece: there the libraries know different versions of Unicode, and order rare
  combining marks differently. So where a tokenizer normalises, texts that have anything to normalise go to the
  reference.
- Dropout, suffixes and prefixes of words it does not know and ignores; byte-level BPE without a split it splits all the
  same. Such tokenizers keep the reference.
- Texts that hold the name of an added token always go to the reference, which knows when a name is a token.

What remains is compared: fixed hard texts when the tokenizer is opened, the first texts that a process encodes, and
after that a sample of them, drawn by content so that a text is compared in every run or in none.
"""

import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

BACKENDS = ("auto", "hf", "sentencepiece", "gigatoken")
REFERENCE = "reference"  # hf or sentencepiece, as the tokenizer has it

FIRST = 64  # texts of a process that are all compared,
FIRST_CHARACTERS = 1 << 20  # unless they are longer together
ONE_IN = 256  # of the others

# characters below never change under NFC and never combine with one of their neighbours, in any version of Unicode
_MAY_CHANGE = re.compile(
    "[^\0-\u02ff\u0375-\u037d\u037f-\u0383\u0388-\u0482\u048a-\u0530\u2002-\u20cf\u2100-\u2125\u2127-\u2129"
    "\u212c-\u2328\u232b-\u2adb\u2add-\u2bff\u3000-\u3029\u3030-\u3098\u309b-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uac00-\ud7a3\ufe0e\ufe0f\uff00-\uffef\U0001f300-\U0001faff]"
)
_NOT_ASCII = re.compile("[^\0-\x7f]")

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
    """The fast backend cuts a text otherwise than the reference; the message names file and line."""


class BackendError(Exception):
    """Why the fast backend cannot be used with a tokenizer: words that follow "because"."""


class DifferenceError(Exception):
    """Text number ``position`` of those to encode came out differently."""

    def __init__(self, position: int, text: str):
        super().__init__(f"{_shown(text)} is cut differently")
        self.position = position


class Fast(NamedTuple):
    """A fast backend. ``encode``: ids of one text, an integer array. ``not_for``: what a text must not hold."""

    name: str
    encode: Callable[[str], np.ndarray]
    not_for: re.Pattern[str] | None = None


# int32 ids of each text, as cut by the reference; the names of special tokens stand for them where it says so
Reference = Callable[[Sequence[str], bool], list[np.ndarray]]


class Checked:
    """A fast backend together with the reference: fast where they have to agree, compared now and then."""

    def __init__(self, fast: Fast, reference: Reference, names: Iterable[str]):
        """
        Args:
            fast: to use.
            reference: what it is compared with.
            names: texts that hold one of these go to the reference.
        """
        self._fast = fast
        self._reference = reference
        self._names = _Names(names)
        self._first, self._first_characters = FIRST, FIRST_CHARACTERS

    def prove(self, texts: Sequence[str] = HARD_TEXTS) -> None:
        """Compare all of ``texts``.

        Raises:
            BackendError: one of them is cut differently.
        """
        texts = [text for text in texts if not self._is_for_the_reference(text)]
        try:
            self._compare(texts, range(len(texts)), self._cut(texts))
        except DifferenceError as difference:
            raise BackendError(f"it is not equal to the reference: {difference}") from None

    def encode(self, texts: Sequence[str], markup: bool) -> list[np.ndarray]:
        """Ids of each text, integer arrays.

        Raises:
            DifferenceError: a text that was compared is cut differently.
        """
        theirs = set()
        if self._names.perhaps_in("\n".join(texts)) or self._fast.not_for is not None:
            theirs = {number for number, text in enumerate(texts) if self._is_for_the_reference(text)}
        places = [number for number in range(len(texts)) if number not in theirs] if theirs else range(len(texts))
        own = [texts[place] for place in places] if theirs else texts
        cut = self._cut(own)
        to_compare = [number for number, text in enumerate(own) if self._is_first(text) or _drawn(text)]
        try:
            self._compare(own, to_compare, cut)
        except DifferenceError as difference:
            difference.position = places[difference.position]
            raise
        if not theirs:
            return cut
        ids: list[np.ndarray | None] = [None] * len(texts)
        ordered = sorted(theirs)
        for numbers, arrays in (
            (places, cut),
            (ordered, self._reference([texts[number] for number in ordered], markup)),
        ):
            for number, array in zip(numbers, arrays, strict=True):
                ids[number] = array
        return ids

    def _is_first(self, text: str) -> bool:
        if self._first <= 0 or self._first_characters <= 0:
            return False
        self._first -= 1
        self._first_characters -= len(text)
        return True

    def _is_for_the_reference(self, text: str) -> bool:
        not_for = self._fast.not_for
        return (not_for is not None and not text.isascii() and not_for.search(text) is not None) or self._names.in_(
            text
        )

    def _cut(self, texts: Sequence[str]) -> list[np.ndarray]:
        encode, ids = self._fast.encode, []
        try:
            for text in texts:
                ids.append(encode(text))
        except BaseException as error:  # a panic of its Rust code is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise DifferenceError(len(ids), text) from None
        return ids

    def _compare(self, texts: Sequence[str], numbers: Iterable[int], cut: list[np.ndarray]) -> None:
        numbers = list(numbers)
        if not numbers:
            return
        expected = self._reference([texts[number] for number in numbers], False)
        for number, ids in zip(numbers, expected, strict=True):
            if not np.array_equal(cut[number], ids):
                raise DifferenceError(number, texts[number])


class _Names:
    """Finds out quickly that none of many names is in a text: most begin alike, and few texts hold that beginning."""

    def __init__(self, names: Iterable[str]):
        # some tokenizers write a space as ▁ before they look for names
        spelled = {spelling for name in names if name for spelling in (name, name.replace("▁", " "))}
        firsts: dict[str, list[str]] = {}
        for name in spelled:
            firsts.setdefault(name[0], []).append(name)
        self._stems = [_common_start(min(alike), max(alike)) for alike in firsts.values()]
        self._pattern = re.compile("|".join(map(re.escape, sorted(spelled))))

    def perhaps_in(self, text: str) -> bool:
        return any(stem in text for stem in self._stems)

    def in_(self, text: str) -> bool:
        return self.perhaps_in(text) and self._pattern.search(text) is not None


def _common_start(one: str, other: str) -> str:
    for place, (mine, its) in enumerate(zip(one, other, strict=False)):
        if mine != its:
            return one[:place]
    return min(one, other, key=len)


def gigatoken_of_json(content: str) -> Fast:
    """gigatoken with a ``tokenizer.json``, without its added tokens.

    Raises:
        BackendError: it is not installed, or cannot read this tokenizer.
    """
    import json

    parts = json.loads(content)
    model = parts["model"]
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise BackendError(f"it does not know {name}")
    parts["added_tokens"] = []
    normalises = any(part["type"] != "Replace" for part in _flat(parts.get("normalizer"), "normalizers"))
    return _open("from_json", json.dumps(parts), _MAY_CHANGE if normalises else None)


def gigatoken_of_sentencepiece(model: bytes, normalises: bool) -> Fast:
    """gigatoken with a SentencePiece model, a serialised ``ModelProto``; ``normalises``: it has a character map.

    Raises:
        BackendError: it is not installed, or cannot read this model.
    """
    return _open("from_sentencepiece", model, _NOT_ASCII if normalises else None)


def _open(opener: str, content: str | bytes, not_for: re.Pattern[str] | None) -> Fast:
    try:
        import gigatoken
    except ImportError as error:
        raise BackendError(f"gigatoken cannot be imported ({error})") from None
    try:
        tokenizer = getattr(gigatoken.Tokenizer, opener)(content)
    except BaseException as error:  # a panic of its Rust code is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise BackendError(f"it cannot read this tokenizer ({_shown(str(error).partition(chr(10))[0], 120)})") from None
    return Fast("gigatoken", tokenizer.encode, not_for)


def _flat(part: dict[str, Any] | None, several: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [inner for one in part[several] for inner in _flat(one, several)]
    return [part]


def _drawn(text: str) -> bool:
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % ONE_IN == 0


def _shown(text: str, longest: int = 60) -> str:
    return repr(text if len(text) <= longest else text[:longest] + "…")
