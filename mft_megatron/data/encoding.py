"""Lines of JSONL become token ids and loss masks: the part of preprocessing that runs in worker processes.

A chunk of lines is one call; its answer is a few arrays and a list of what could not be used, so that little crosses
between processes. The same lines give the same answer in whatever process.
"""

import dataclasses
import json
from collections.abc import Iterator

import numpy as np

from mft_megatron.data.chat_format import ChatFormat, Segment
from mft_megatron.data.conversation import RecordError, read_record
from mft_megatron.data.tokenizer import Tokenizer

OVERLONG = ("drop", "truncate")
# drops that a user asks for with options; every other reason is a fault in the data
INTENDED_DROPS = frozenset({"overlong"})


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Lines of one file: ``lines[i]`` is line ``first_line + i``, counted from 1."""

    path: str
    first_line: int
    lines: list[bytes]


@dataclasses.dataclass(frozen=True)
class Drop:
    """A record that is left out: where, the reason it is counted under, and the words for the user."""

    path: str
    line: int
    reason: str
    message: str


@dataclasses.dataclass
class EncodedChunk:
    """Samples of a chunk, in order. ``ids`` int32 and ``mask`` uint8 of all samples one behind the other, ``lengths``
    int32 of each; ``records`` counts the lines that are not blank."""

    ids: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    records: int
    truncated: int
    drops: list[Drop]


class Encoder:
    """Encodes chunks with one tokenizer, one chat format and one limit of length."""

    def __init__(self, tokenizer: Tokenizer, style: ChatFormat, seq_length: int, overlong: str):
        """
        Args:
            tokenizer: of the data set.
            style: how conversations are written.
            seq_length: longest sample that fits a pack.
            overlong: what becomes of longer ones, of :data:`OVERLONG`.
        """
        self._tokenizer = tokenizer
        self._style = style
        self._seq_length = seq_length
        self._overlong = overlong

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Encode one chunk; what cannot be used is in ``drops``, nothing is raised for it."""
        places, samples, drops = [], [], []
        records = 0
        for number, line in enumerate(chunk.lines, chunk.first_line):
            if not line.strip():
                continue
            records += 1
            try:
                segments = self._style.segments(read_record(_parse(line)))
            except RecordError as error:
                drops.append(Drop(chunk.path, number, error.reason, str(error)))
                continue
            places.append(number)
            samples.append(segments)
        ids, masks, truncated = [], [], 0
        for number, (tokens, mask) in zip(places, self._tokenize(samples), strict=True):
            if len(tokens) > self._seq_length:
                if self._overlong == "drop":
                    message = f"{len(tokens)} tokens, more than --seq-length {self._seq_length}"
                    drops.append(Drop(chunk.path, number, "overlong", message))
                    continue
                tokens, mask = tokens[: self._seq_length], mask[: self._seq_length]
                truncated += 1
            if not mask[1:].any():
                what = "after truncation" if len(tokens) == self._seq_length else "in it"
                drops.append(Drop(chunk.path, number, "no_supervised_token", f"no supervised token {what}"))
                continue
            ids.append(tokens)
            masks.append(mask)
        drops.sort(key=lambda drop: drop.line)
        return EncodedChunk(
            np.concatenate(ids) if ids else np.empty(0, np.int32),
            np.concatenate(masks) if masks else np.empty(0, np.uint8),
            np.array([len(tokens) for tokens in ids], np.int32),
            records,
            truncated,
            drops,
        )

    def _tokenize(self, samples: list[list[Segment]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and mask of each sample; the texts of the whole chunk go to the tokenizer in one batch."""
        texts = [segment.text for segments in samples for segment in segments if self._special(segment) is None]
        encoded = iter(self._tokenizer.encode_batch(texts))
        for segments in samples:
            ids, supervised = [], []
            for segment in segments:
                special = self._special(segment)
                own = next(encoded) if special is None else [special]
                ids += own
                supervised += [segment.supervised] * len(own)
            yield np.array(ids, np.int32), np.array(supervised, np.uint8)

    def _special(self, segment: Segment) -> int | None:
        return self._tokenizer.token_id(segment.text) if segment.special else None


def _parse(line: bytes):
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecordError("invalid_utf8", f"not UTF-8 (byte {error.start} of the line)") from None
    except ValueError as error:
        raise RecordError("invalid_json", f"not JSON ({error})") from None
