"""The samples of a batch as token arrays; all texts of the batch are tokenised in one call."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

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


class TokenArrays(NamedTuple):
    """Tokens of some samples.

    Attributes:
        ids: int32, of all samples, concatenated.
        mask: uint8, 1 where a token of ``ids`` is supervised.
        lengths: int32 [samples].
        weights: float32, of each token of ``ids``; ``None`` where all are 0 or 1, as the mask is.
    """

    ids: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray | None


class _Text:
    """A text that is tokenised as a whole, and the parts of it that are context.

    Attributes:
        text: so far.
        weight: of its tokens.
        markup: as in :class:`~mft_megatron.data.records.segments.Segment`.
        borders: characters before each change between context and supervised text; the text begins supervised.
    """

    def __init__(self, weight: float, markup: bool):
        self.text = ""
        self.weight = weight
        self.markup = markup
        self.borders: list[int] = []

    def append(self, text: str, context: bool) -> None:
        if text and context is (len(self.borders) % 2 == 0):
            self.borders.append(len(self.text))
        self.text += text


class BatchedSamples:
    """Samples of a batch as arrays of ids: those of tokens, and those of texts, which follow at the end."""

    def __init__(self, texts: KnownTexts):
        """Start without a sample; ``texts`` are those of earlier batches."""
        self._texts = texts
        self._arrays: list[np.ndarray] = []
        self._weights: list[float] = []
        # index of the array of each text of which only a part is context, and the text
        self._partly: list[tuple[int, _Text]] = []
        # index of the first array of each sample, which is empty unless the sample begins with other tokens than its
        # segments
        self._firsts: list[int] = []
        # without and with markup: texts to be tokenised, and the indices of their arrays
        self._waiting: tuple[tuple[list[str], list[int]], ...] = (([], []), ([], []))

    def add(self, segments: Iterable[Segment]) -> None:
        """Append a sample.

        Consecutive texts of one kind are concatenated, so that they are tokenised as in a prompt that is tokenised as a
        whole; context is of the kind of the answer that it is a part of. A token that the vocabulary does not have is
        text. A segment that begins a text, if there is one, is the first that is not empty.
        """
        arrays, weights = self._arrays, self._weights
        self._firsts.append(len(arrays))
        arrays.append(_NOTHING)
        weights.append(0.0)
        pending: _Text | None = None
        for text, weight, special, markup, begins, context in segments:
            if begins:
                arrays[self._firsts[-1]] = self._texts.tokenizer.beginning.ids
                if not special:
                    begun = self._texts.tokenizer.beginning.text(text, markup)
                    if begun is None:
                        arrays.append(self._texts.tokenizer.beginning.encode(text, markup))
                        weights.append(weight)
                        continue
                    text = begun
            if special and (token := self._texts.token(text)) is not None:
                if pending is not None:
                    self._add_text(pending)
                    pending = None
                arrays.append(token)
                weights.append(0.0 if context else weight)
                continue
            if pending is None or (pending.weight, pending.markup) != (weight, markup):
                if pending is not None:
                    self._add_text(pending)
                pending = _Text(weight, markup)
            pending.append(text, context)
        if pending is not None:
            self._add_text(pending)

    def _add_text(self, pending: _Text) -> None:
        text, markup = pending.text, pending.markup
        if pending.borders and pending.borders != [0]:
            self._partly.append((len(self._arrays), pending))
        ids = self._texts.short[markup].get(text) if len(text) <= _SHORT else None
        if ids is None:
            texts, indices = self._waiting[markup]
            texts.append(text)
            indices.append(len(self._arrays))
            ids = _NOTHING
        self._arrays.append(ids)
        self._weights.append(0.0 if pending.borders == [0] else pending.weight)

    def arrays(self, bos: int | None) -> TokenArrays:
        """Tokenise the texts and hand over the samples; the batch is empty then.

        Args:
            bos: id that every sample begins with, unsupervised; added to samples that do not begin with it.

        Raises:
            SampleError: the fast backend is wrong.
        """
        for markup, (texts, indices) in enumerate(self._waiting):
            if texts:
                self._tokenise(texts, indices, bool(markup))
        if not self._firsts:
            return TokenArrays(np.empty(0, np.int32), np.empty(0, np.uint8), np.empty(0, np.int32), None)
        context = self._context_tokens()
        if bos is not None:
            self._begin_with(bos)
        arrays, self._arrays = self._arrays, []
        counts = np.fromiter(map(len, arrays), np.int64, len(arrays))
        ids = np.concatenate(arrays, dtype=np.int32, casting="unsafe")
        arrays.clear()  # memory holds the ids of a large batch once
        of_arrays = np.array(self._weights, np.float32)
        mask = np.repeat((of_arrays > 0).astype(np.uint8), counts)
        weights = None if set(self._weights) <= {0, 1} else np.repeat(of_arrays, counts)
        starts = np.cumsum(counts) - counts
        for index, first, last in context:
            of_context = slice(starts[index] + first, starts[index] + last)
            mask[of_context] = 0
            if weights is not None:
                weights[of_context] = 0
        return TokenArrays(ids, mask, np.add.reduceat(counts, self._firsts).astype(np.int32), weights)

    def _context_tokens(self) -> list[tuple[int, int, int]]:
        """Find the tokens of texts of which a part is context: index of the array, first token, and the one after.

        A text's beginning, tokenised alone, has the same tokens up to the border, and so has its end after it. Where a
        token crosses the border, it is context.
        """
        context: list[tuple[int, int, int]] = []
        for index, partly in self._partly:
            text, whole = partly.text, self._arrays[index]
            borders = [*partly.borders, len(text)] if len(partly.borders) % 2 else partly.borders
            parts = [text[:border] for border in borders[::2]] + [text[border:] for border in borders[1::2]]
            found = self._encode(parts, [index] * len(parts), partly.markup)
            for beginning, end in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
                context.append((index, _same(beginning, whole), len(whole) - _same(end[::-1], whole[::-1])))
        self._partly = []
        return context

    def _tokenise(self, texts: list[str], indices: list[int], markup: bool) -> None:
        for index, text, ids in zip(indices, texts, self._encode(texts, indices, markup), strict=True):
            self._arrays[index] = ids
            self._texts.keep(text, markup, ids)
        texts.clear()

    def _encode(self, texts: list[str], indices: list[int], markup: bool) -> list[np.ndarray]:
        try:
            return self._texts.tokenizer.encode_arrays(texts, markup)
        except DifferenceError as difference:
            index = indices[difference.position]
            raise SampleError(int(np.searchsorted(self._firsts, index, "right")) - 1, str(difference)) from None

    def _begin_with(self, token: int) -> None:
        head = np.array([token], np.int32)
        for first, end in zip(self._firsts, [*self._firsts[1:], len(self._arrays)], strict=True):
            begins = next((array[0] for array in self._arrays[first:end] if len(array)), None)
            if begins != token:
                self._arrays[first] = np.concatenate([head, self._arrays[first]])


def _same(one: np.ndarray, other: np.ndarray) -> int:
    """Count the tokens with which both arrays begin."""
    shorter = min(len(one), len(other))
    return shorter if (same := one[:shorter] == other[:shorter]).all() else int(np.argmin(same))
