"""The samples of a batch as token arrays; all texts of the batch are tokenised in one call."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from mft_megatron.data.records.segments import Segment
from mft_megatron.data.tokenizers.backends import DifferenceError
from mft_megatron.data.tokenizers.beginnings import Beginning

# ids of texts up to this many characters are kept: role names, line breaks, short answers
_SHORT = 32
_KEPT = 1 << 14
_NOTHING = np.empty(0, np.int32)


class SampleError(Exception):
    """The fast backend tokenises a text of a sample otherwise than the reference.

    Attributes:
        sample: index of the sample in the batch.
    """

    def __init__(self, sample: int, message: str):
        super().__init__(message)
        self.sample = sample


class TextEncoder(Protocol):
    """The part of a :class:`~mft_megatron.data.tokenizers.tokenizer.Tokenizer` that samples need."""

    @property
    def beginning(self) -> Beginning:
        """How the tokenizer's own ``encode`` begins a text."""

    def token_id(self, token: str) -> int | None:
        """Id of a token by its name; ``None`` if the vocabulary does not have it."""

    def encode_arrays(self, texts: Sequence[str], markup: bool = False) -> list[np.ndarray]:
        """Encode texts; nothing is added to them. Returns ids of each text, an integer array [tokens]."""


class KnownTexts:
    """Ids of token names and of short texts, kept from batch to batch; arrays of any integer type."""

    def __init__(self, tokenizer: TextEncoder):
        """Start with no text; ``tokenizer`` makes the ids."""
        self.tokenizer = tokenizer
        self._tokens: dict[str, np.ndarray | None] = {}
        # by text, without and with markup
        self.short: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})

    def token(self, name: str) -> np.ndarray | None:
        """Id of a token, int32 [1], or ``None`` where the vocabulary has no such token."""
        try:
            return self._tokens[name]
        except KeyError:
            token_id = self.tokenizer.token_id(name)
            self._tokens[name] = token = None if token_id is None else np.array([token_id], np.int32)
            return token

    def keep(self, text: str, markup: bool, ids: np.ndarray) -> None:
        """Keep the ids of a text if it is short."""
        if len(text) <= _SHORT:
            short = self.short[markup]
            if len(short) >= _KEPT:
                short.clear()
            short[text] = ids


class BatchedSamples:
    """Samples of a batch as arrays of ids: those of tokens, and those of texts, which follow at the end."""

    def __init__(self, texts: KnownTexts):
        """Start without a sample; ``texts`` are those of earlier batches."""
        self._texts = texts
        self._arrays: list[np.ndarray] = []
        self._supervised: list[bool] = []
        # index of the first array of each sample, which is empty unless the sample begins with other tokens than its
        # segments
        self._firsts: list[int] = []
        # without and with markup: texts to be tokenised, and the indices of their arrays
        self._waiting: tuple[tuple[list[str], list[int]], ...] = (([], []), ([], []))

    def add(self, segments: Iterable[Segment]) -> None:
        """Append a sample.

        Consecutive texts of one kind are concatenated, so that they are tokenised as in a prompt that is tokenised as a
        whole. A token that the vocabulary does not have is text. A segment that begins a text, if there is one, is the
        first that is not empty.
        """
        arrays, supervised = self._arrays, self._supervised
        self._firsts.append(len(arrays))
        arrays.append(_NOTHING)
        supervised.append(False)
        pending: str | None = None
        kind = False, False
        for text, learn, special, markup, begins in segments:
            if begins:
                arrays[self._firsts[-1]] = self._texts.tokenizer.beginning.ids
                if not special:
                    begun = self._texts.tokenizer.beginning.text(text, markup)
                    if begun is None:
                        arrays.append(self._texts.tokenizer.beginning.encode(text, markup))
                        supervised.append(learn)
                        continue
                    text = begun
            if special and (token := self._texts.token(text)) is not None:
                if pending is not None:
                    self._add_text(pending, *kind)
                    pending = None
                arrays.append(token)
                supervised.append(learn)
            elif pending is None:
                pending, kind = text, (learn, markup)
            elif kind == (learn, markup):
                pending += text
            else:
                self._add_text(pending, *kind)
                pending, kind = text, (learn, markup)
        if pending is not None:
            self._add_text(pending, *kind)

    def _add_text(self, text: str, learn: bool, markup: bool) -> None:
        ids = self._texts.short[markup].get(text) if len(text) <= _SHORT else None
        if ids is None:
            texts, indices = self._waiting[markup]
            texts.append(text)
            indices.append(len(self._arrays))
            ids = _NOTHING
        self._arrays.append(ids)
        self._supervised.append(learn)

    def arrays(self, bos: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokenise the texts and hand over the samples; the batch is empty then.

        Args:
            bos: id that every sample begins with, unsupervised; added to samples that do not begin with it.

        Returns:
            ids: int32, of all samples, concatenated.
            mask: uint8, 1 where a token of ``ids`` is supervised.
            lengths: int32 [samples].

        Raises:
            SampleError: the fast backend is wrong.
        """
        for markup, (texts, indices) in enumerate(self._waiting):
            if texts:
                self._tokenise(texts, indices, bool(markup))
        if not self._firsts:
            return np.empty(0, np.int32), np.empty(0, np.uint8), np.empty(0, np.int32)
        if bos is not None:
            self._begin_with(bos)
        arrays, self._arrays = self._arrays, []
        counts = np.fromiter(map(len, arrays), np.int64, len(arrays))
        ids = np.concatenate(arrays, dtype=np.int32, casting="unsafe")
        arrays.clear()  # memory holds the ids of a large batch once
        mask = np.repeat(np.array(self._supervised, np.uint8), counts)
        return ids, mask, np.add.reduceat(counts, self._firsts).astype(np.int32)

    def _tokenise(self, texts: list[str], indices: list[int], markup: bool) -> None:
        try:
            ids_of_texts = self._texts.tokenizer.encode_arrays(texts, markup)
        except DifferenceError as difference:
            index = indices[difference.position]
            raise SampleError(int(np.searchsorted(self._firsts, index, "right")) - 1, str(difference)) from None
        for index, text, ids in zip(indices, texts, ids_of_texts, strict=True):
            self._arrays[index] = ids
            self._texts.keep(text, markup, ids)
        texts.clear()

    def _begin_with(self, token: int) -> None:
        head = np.array([token], np.int32)
        for first, end in zip(self._firsts, [*self._firsts[1:], len(self._arrays)], strict=True):
            begins = next((array[0] for array in self._arrays[first:end] if len(array)), None)
            if begins != token:
                self._arrays[first] = np.concatenate([head, self._arrays[first]])
