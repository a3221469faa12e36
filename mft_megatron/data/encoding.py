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
from mft_megatron.errors import InputError

OVERLONG = ("drop", "truncate")
# drops that a user asks for with options; every other reason is a fault in the data
INTENDED_DROPS = frozenset({"overlong", "truncated_to_nothing"})


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
        """Encode one chunk; a record that cannot be used is in ``drops``.

        Raises:
            InputError: a chat record, and a tokenizer without the token that ends a turn.
        """
        places, samples, drops = [], [], []
        records = 0
        for number, line in enumerate(chunk.lines, chunk.first_line):
            if not line.strip():
                continue
            records += 1
            try:
                conversation = read_record(_parse(line))
                segments = self._style.segments(conversation)
            except RecordError as error:
                drops.append(Drop(chunk.path, number, error.reason, str(error)))
                continue
            if not conversation.raw and self._tokenizer.token_id(self._style.stop_token) is None:
                raise InputError(
                    f"{chunk.path}:{number}: a chat record, but the tokenizer has no token {self._style.stop_token} to "
                    f"end a turn of --chat-template {self._style.name} with; use mftcoder, or add the token"
                )
            places.append(number)
            samples.append(segments)
        ids, masks, truncated = [], [], 0
        for number, (tokens, mask) in zip(places, self._tokenize(samples), strict=True):
            if not mask[1:].any():
                drops.append(Drop(chunk.path, number, "no_supervised_token", "no supervised token in it"))
                continue
            if len(tokens) > self._seq_length:
                if self._overlong == "drop":
                    message = f"{len(tokens)} tokens, more than --seq-length {self._seq_length}"
                    drops.append(Drop(chunk.path, number, "overlong", message))
                    continue
                tokens, mask = tokens[: self._seq_length], mask[: self._seq_length]
                if not mask[1:].any():
                    message = f"no supervised token among its first {self._seq_length}"
                    drops.append(Drop(chunk.path, number, "truncated_to_nothing", message))
                    continue
                truncated += 1
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
        """Ids and mask of each sample; the texts of the whole chunk go to the tokenizer in one batch of a kind."""
        parts_of_samples = [list(self._parts(segments)) for segments in samples]
        encoded = {
            markup: iter(
                self._tokenizer.encode_batch(
                    [part.text for parts in parts_of_samples for part in parts if _is_text(part, markup)], markup=markup
                )
            )
            for markup in (False, True)
        }
        for parts in parts_of_samples:
            ids, supervised, counts = [], [], []
            for part in parts:
                own = [self._tokenizer.token_id(part.text)] if part.special else next(encoded[part.markup])
                ids += own
                supervised.append(part.supervised)
                counts.append(len(own))
            yield np.array(ids, np.int32), np.repeat(np.array(supervised, np.uint8), counts)

    def _parts(self, segments: list[Segment]) -> Iterator[Segment]:
        """The segments; neighbouring texts of one kind are joined, so that they are cut as in a prompt cut whole.

        A special segment that the vocabulary has no token for is text.
        """
        pending: Segment | None = None
        for segment in segments:
            if segment.special and self._tokenizer.token_id(segment.text) is None:
                segment = dataclasses.replace(segment, special=False)
            if pending is not None:
                if _same_kind(pending, segment):
                    pending = dataclasses.replace(pending, text=pending.text + segment.text)
                    continue
                yield pending
            pending = segment
        if pending is not None:
            yield pending


def _is_text(part: Segment, markup: bool) -> bool:
    return not part.special and part.markup == markup


def _same_kind(one: Segment, other: Segment) -> bool:
    return not (one.special or other.special) and (one.supervised, one.markup) == (other.supervised, other.markup)


def _parse(line: bytes):
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecordError("invalid_utf8", f"not UTF-8 (byte {error.start} of the line)") from None
    except RecursionError:
        raise RecordError("invalid_json", "not JSON that can be read (nested too deeply)") from None
    except ValueError as error:
        raise RecordError("invalid_json", f"not JSON ({error})") from None
