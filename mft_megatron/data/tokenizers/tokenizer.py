"""The interface of all tokenizers, and the choice of the backend that encodes texts.

Texts arrive in segments. A segment is encoded alone and nothing is added to it; the ids of a sample are the
concatenated ids of its segments, and they decode to the sample's text. Many tokenizers write a space before every text;
between segments that would be a space that is not in the data, so it is switched off when they are opened. Only raw
samples begin with it (:mod:`.beginnings`), because a server encodes a raw prompt with the tokenizer's own ``encode``.
"""

import abc
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mft_megatron.data.storage.indexed_dataset import token_dtype
from mft_megatron.errors import InputError

from .backend_names import REFERENCE
from .backends import BackendError, CheckedBackend, DifferenceError, FastBackend, Names
from .beginnings import Beginning
from .large_texts import LARGE, split_text

_NO_IDS = np.empty(0, np.int32)


class SpecialToken(NamedTuple):
    """A token whose name becomes the token in markup.

    Attributes:
        id: of the token.
        lstrip, rstrip: the token absorbs the whitespace before or after its name.
    """

    id: int
    lstrip: bool
    rstrip: bool


class Tokenizer(abc.ABC):
    """A tokenizer, opened from a file or folder.

    Attributes:
        type: Megatron's ``--tokenizer-type``.
        reference: name of the reference among the backends.
        model: absolute path of the file or folder.
        backend_note: a line for the user about the choice of the backend; empty if there was no choice.
    """

    type: str
    reference: str
    model: str
    backend_note: str = ""
    _checked: CheckedBackend | None = None

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, including added tokens: ``len(tokenizer)`` in transformers."""

    @property
    @abc.abstractmethod
    def chat_template(self) -> str | None:
        """Jinja template that comes with the tokenizer; ``None`` if there is none."""

    @property
    @abc.abstractmethod
    def special_tokens(self) -> Mapping[str, SpecialToken]:
        """Tokens that markup can name, by name."""

    @property
    @abc.abstractmethod
    def bos_token(self) -> str | None:
        """Name of the token that begins a text; ``None`` if there is none."""

    @property
    @abc.abstractmethod
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text; ``None`` if there is none."""

    @property
    @abc.abstractmethod
    def eos_token_id(self) -> int:
        """Id of the end-of-text token."""

    @property
    @abc.abstractmethod
    def pad_token_id(self) -> int:
        """Id of the padding token; that of the end-of-text token if there is none."""

    @property
    @abc.abstractmethod
    def end_of_text(self) -> str:
        """Name of the end-of-text token."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """sha256 over everything that decides ids; paths do not."""

    @abc.abstractmethod
    def token_id(self, token: str) -> int | None:
        """Id of a token by its name; ``None`` if the vocabulary does not have it."""

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str], markup: bool = False) -> list[list[int]]:
        """Encode texts with the reference; nothing is added to them.

        Args:
            texts: to encode.
            markup: whether names of special tokens in the texts become those tokens.

        Returns:
            ids of each text.
        """

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, in which special tokens are written by name."""

    @property
    @abc.abstractmethod
    def beginning_key(self) -> str:
        """Text of everything besides :attr:`fingerprint` that decides :attr:`beginning`; equal where that is equal."""

    @property
    def encoding_key(self) -> str:
        """Text of everything that decides the ids of samples."""
        return f"{self.fingerprint}/{self.beginning_key}"

    @functools.cached_property
    def beginning(self) -> Beginning:
        """How the tokenizer's own ``encode`` begins a text."""
        ids, space = np.array(self._ids_before_texts(), np.int32), self._space_before_texts()
        after_tokens = False
        if space is not None and space("a"):
            (after,) = self._encode_own([f"{self.end_of_text}a"], True)
            after_tokens = after == [self.eos_token_id, *self.encode_batch([" a"])[0]]
        return Beginning(ids, space, after_tokens, Names(self.special_tokens), self._encode_own)

    @abc.abstractmethod
    def _ids_before_texts(self) -> list[int]:
        """Ids that ``encode`` puts before every text."""

    @abc.abstractmethod
    def _space_before_texts(self) -> Callable[[str], bool] | None:
        """One of :data:`.beginnings.RULES`; ``None`` if none of them tells what ``encode`` does."""

    @abc.abstractmethod
    def _encode_own(self, texts: Sequence[str], markup: bool) -> list[list[int]]:
        """Encode texts with ``encode``, without the ids that it puts before and after them."""

    @abc.abstractmethod
    def _open_fast(self) -> FastBackend:
        """Open the fast backend.

        Raises:
            BackendError: it cannot be used with this tokenizer.
        """

    @property
    def backend(self) -> str:
        """Backend that :meth:`encode_arrays` uses: "hf", "sentencepiece" or "gigatoken"."""
        return self.reference if self._checked is None else "gigatoken"

    def use_backend(self, backend: str) -> None:
        """Choose the backend of :meth:`encode_arrays` and describe the choice in ``backend_note``.

        Args:
            backend: one of :data:`~.backend_names.BACKENDS`, or "reference".

        Raises:
            InputError: this kind of tokenizer has no such backend, or gigatoken is asked for by name but cannot be used
                or is not equal to the reference.
        """
        self._checked, self.backend_note = None, ""
        if backend in (REFERENCE, self.reference):
            return
        if backend not in ("auto", "gigatoken"):
            raise InputError(
                f"--tokenizer-backend {backend}: cannot read a {self.type}; give auto, {self.reference} or gigatoken"
            )
        try:
            checked = CheckedBackend(self._open_fast(), self.encode_reference, self.special_tokens)
            checked.prove()
        except BackendError as refusal:
            if backend == "gigatoken":
                raise InputError(f"--tokenizer-backend gigatoken: {refusal}; give auto or {self.reference}") from None
            self.backend_note = f"texts are tokenised by {self.reference}, not by gigatoken, because {refusal}"
            return
        self._checked = checked
        self.backend_note = (
            f"texts are tokenised by gigatoken, which is compared with {self.reference} on a sample of them"
        )

    def encode_arrays(self, texts: Sequence[str], markup: bool = False) -> list[np.ndarray]:
        """Encode texts as :meth:`encode_batch` does, with the chosen backend.

        Memory does not grow with the length of a text, except for the ids.

        Args:
            texts: to encode.
            markup: whether names of special tokens in the texts become those tokens.

        Returns:
            ids of each text, an integer array [tokens].

        Raises:
            DifferenceError: the fast backend and the reference differ on one of the texts.
        """
        encode = self.encode_reference if self._checked is None else self._checked.encode
        ids: list[np.ndarray] = [_NO_IDS] * len(texts)
        small = [index for index, text in enumerate(texts) if len(text) <= LARGE]
        if len(small) == len(texts):
            return encode(texts, markup)
        try:
            for index, text_ids in zip(small, encode([texts[index] for index in small], markup), strict=True):
                ids[index] = text_ids
        except DifferenceError as difference:
            difference.position = small[difference.position]
            raise
        dtype = token_dtype(self.vocab_size)
        for index in sorted(set(range(len(texts))) - set(small)):
            parts = split_text(texts[index], lambda tested: self.encode_batch(tested, markup))
            try:
                # one part at a time: memory does not hold the parts beside the text
                ids[index] = np.concatenate([encode([part], markup)[0].astype(dtype) for part in parts])
            except DifferenceError as difference:
                difference.position = index
                raise
        return ids

    def encode_reference(self, texts: Sequence[str], markup: bool = False) -> list[np.ndarray]:
        """Encode texts as :meth:`encode_batch` does, with the reference; returns ids of each, int32 [tokens]."""
        ids: list[np.ndarray] = []
        start = characters = 0
        for end, text in enumerate(texts, 1):  # in small batches, because it needs much memory for each text of a batch
            characters += len(text)
            if characters > LARGE or end == len(texts):
                ids += [np.array(text_ids, np.int32) for text_ids in self.encode_batch(texts[start:end], markup)]
                start, characters = end, 0
        return ids
