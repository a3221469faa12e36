"""Records become token ids and loss masks: the part of preprocessing that runs in worker processes.

A batch of records is one call; its answer is a few arrays and a list of what could not be used, so that little crosses
between processes. The same records give the same answer in whatever process.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import orjson

from mft_megatron.data.chat_templates.formats import ChatFormat
from mft_megatron.data.records.conversation import Conversation, RecordError
from mft_megatron.data.records.fim import Fim
from mft_megatron.data.records.json_values import json_fault
from mft_megatron.data.records.record_formats import read_record
from mft_megatron.data.records.segments import Segment
from mft_megatron.data.sample_slices import supervised_tokens
from mft_megatron.data.tasks.record_batches import RecordBatch
from mft_megatron.data.tokenizers.backends import BackendMismatch, DifferenceError
from mft_megatron.data.tokenizers.tokenizer import Tokenizer
from mft_megatron.errors import InputError

__all__ = ["BackendMismatch", "Drop", "EncodedBatch", "Encoder", "RecordBatch", "TaskEncoding"]

# texts up to this many characters are kept once they are cut: role names, line breaks, short answers
_SHORT = 32
_KEPT = 1 << 14
_NOTHING = np.empty(0, np.int32)


@dataclasses.dataclass(frozen=True)
class TaskEncoding:
    """How the records of a task become samples.

    Attributes:
        style: chat format.
        record_format: a key of :data:`mft_megatron.data.records.record_formats.RECORD_FORMATS`, or "auto".
        fim: how documents are written as fill-in-the-middle; ``None`` for never.
        add_bos: every sample begins with the bos token, once.
    """

    style: ChatFormat
    record_format: str = "auto"
    fim: Fim | None = None
    add_bos: bool = False


@dataclasses.dataclass(frozen=True)
class Drop:
    """A record that is left out: where, the reason it is counted under, and the words for the user."""

    path: str
    line: int
    reason: str
    message: str


@dataclasses.dataclass
class EncodedBatch:
    """Samples of a batch, in order, whole however long they are.

    ``ids`` int32 and ``mask`` uint8 (1: supervised) of all samples one behind the other, ``lengths`` int32 of each, at
    least 2. ``records`` counts the lines that are not blank, ``documents`` the samples that came of ``text`` records,
    ``filled`` those that were cut for filling in the middle.
    """

    ids: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    records: int
    documents: int
    drops: list[Drop]
    filled: int = 0


class Encoder:
    """Encodes batches of several tasks with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, tasks: Mapping[str, TaskEncoding]):
        """
        Raises:
            InputError: samples are to begin with a token that the tokenizer does not have.
        """
        self._tokenizer = tokenizer
        self._tasks = tasks
        self._known = {name: tokenizer.token_id(task.style.stop_token) is not None for name, task in tasks.items()}
        self._texts = _Texts(tokenizer)
        for name, task in tasks.items():
            if task.add_bos and tokenizer.bos_token_id is None:
                raise InputError(f"task {name}: samples are to begin with a bos token, but the tokenizer names none")

    def encode(self, task: str, batch: RecordBatch) -> EncodedBatch:
        """Encode one batch of a task; a record that cannot be used is in ``drops``.

        Raises:
            InputError: a chat record, and a tokenizer without the token that ends a turn.
            BackendMismatch: the tokenizer's fast backend cuts a text otherwise than its reference.
        """
        plan = self._tasks[task]
        samples, drops = _Samples(self._texts), []
        lines: list[int] = []
        documents: list[bool] = []
        filled: list[bool] = []
        records = 0
        for number, line in enumerate(batch.lines, batch.first_line):
            try:
                if type(line) is bytes:
                    if not line or line.isspace():
                        continue
                    records += 1
                    record = _parse(line)
                else:
                    records += 1
                    record = line
                conversation = read_record(record, plan.record_format)
                cut = None if plan.fim is None else _cut_for_filling(conversation, plan.fim)
                segments = plan.style.segments(conversation) if cut is None else cut
            except RecordError as error:
                drops.append(Drop(batch.path, number, error.reason, str(error)))
                continue
            if not (conversation.raw or self._known[task]):
                raise InputError(
                    f"{batch.path}:{number}: a chat record, but the tokenizer has no token {plan.style.stop_token} to "
                    f"end a turn of --chat-template {plan.style.name} with; use mftcoder, or add the token"
                )
            lines.append(number)
            documents.append(conversation.document)
            filled.append(cut is not None)
            samples.add(segments)
        try:
            ids, mask, lengths = samples.arrays(self._tokenizer.bos_token_id if plan.add_bos else None)
        except _SampleError as differs:
            raise BackendMismatch(
                f"{batch.path}:{lines[differs.sample]}: {differs} by {self._tokenizer.backend} and "
                f"{self._tokenizer.reference}"
            ) from None
        useful = supervised_tokens(mask, lengths) > 0
        for place in np.flatnonzero(~useful):
            drops.append(Drop(batch.path, lines[place], "no_supervised_token", "no supervised token in it"))
        if not useful.all():
            kept = np.repeat(useful, lengths)
            ids, mask, lengths = ids[kept], mask[kept], lengths[useful]
        drops.sort(key=lambda drop: drop.line)
        documents_kept, filled_kept = (int(np.count_nonzero(useful & np.array(of, bool))) for of in (documents, filled))
        return EncodedBatch(ids, mask, lengths, records, documents_kept, drops, filled_kept)


def _cut_for_filling(conversation: Conversation, fim: Fim) -> list[Segment] | None:
    # by content alone: the same record is treated alike wherever it lies
    key = "\0".join([turn.content for turn in conversation.turns]).encode()
    return fim.segments(conversation, key)


class _SampleError(Exception):
    def __init__(self, sample: int, message: str):
        super().__init__(message)
        self.sample = sample


class _Texts:
    """What outlives a batch: ids of token names and of short texts, each found once. Arrays of any integer type."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._tokens: dict[str, np.ndarray | None] = {}
        # by text, without and with markup
        self.short: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})

    def token(self, name: str) -> np.ndarray | None:
        """The one id of a token, or ``None`` where the vocabulary has no such token."""
        try:
            return self._tokens[name]
        except KeyError:
            number = self.tokenizer.token_id(name)
            self._tokens[name] = token = None if number is None else np.array([number], np.int32)
            return token

    def keep(self, text: str, markup: bool, ids: np.ndarray) -> None:
        if len(text) <= _SHORT:
            short = self.short[markup]
            if len(short) >= _KEPT:
                short.clear()
            short[text] = ids


class _Samples:
    """Samples of a batch as pieces: tokens, and texts that are all cut in one go at the end."""

    def __init__(self, texts: _Texts):
        self._texts = texts
        self._pieces: list[np.ndarray | None] = []  # None: still to be cut
        self._supervised: list[bool] = []
        self._firsts: list[int] = []  # first piece of each sample, which is empty unless a token is put in front
        # without and with markup: texts to be cut, and the pieces they are
        self._waiting: tuple[tuple[list[str], list[int]], ...] = (([], []), ([], []))

    def add(self, segments: Iterable[Segment]) -> None:
        """One more sample. Neighbouring texts of one kind are joined, so that they are cut as in a prompt cut whole; a
        token that the vocabulary does not have is text."""
        pieces, supervised = self._pieces, self._supervised
        self._firsts.append(len(pieces))
        pieces.append(_NOTHING)
        supervised.append(False)
        pending: str | None = None
        kind = None
        for text, learn, special, markup in segments:
            if special and (token := self._texts.token(text)) is not None:
                if pending is not None:
                    self._add_text(pending, *kind)
                    pending = None
                pieces.append(token)
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
            texts, places = self._waiting[markup]
            texts.append(text)
            places.append(len(self._pieces))
        self._pieces.append(ids)
        self._supervised.append(learn)

    def arrays(self, bos: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids int32 and mask uint8 of all samples one behind the other, and lengths int32 of each.

        Args:
            bos: what every sample is to begin with, unsupervised, unless it does.

        Raises:
            _SampleError: the fast backend is wrong.
        """
        for markup, (texts, places) in enumerate(self._waiting):
            if texts:
                self._cut(texts, places, bool(markup))
        if not self._firsts:
            return np.empty(0, np.int32), np.empty(0, np.uint8), np.empty(0, np.int32)
        if bos is not None:
            self._begin_with(bos)
        counts = np.fromiter(map(len, self._pieces), np.int64, len(self._pieces))
        ids = np.concatenate(self._pieces, dtype=np.int32, casting="unsafe")
        mask = np.repeat(np.array(self._supervised, np.uint8), counts)
        return ids, mask, np.add.reduceat(counts, self._firsts).astype(np.int32)

    def _cut(self, texts: list[str], places: list[int], markup: bool) -> None:
        try:
            cut = self._texts.tokenizer.encode_arrays(texts, markup)
        except DifferenceError as difference:
            piece = places[difference.position]
            raise _SampleError(int(np.searchsorted(self._firsts, piece, "right")) - 1, str(difference)) from None
        for place, text, ids in zip(places, texts, cut, strict=True):
            self._pieces[place] = ids
            self._texts.keep(text, markup, ids)

    def _begin_with(self, token: int) -> None:
        head = np.array([token], np.int32)
        for first, end in zip(self._firsts, [*self._firsts[1:], len(self._pieces)], strict=True):
            begins = next((piece[0] for piece in self._pieces[first:end] if len(piece)), None)
            if begins != token:
                self._pieces[first] = head


def _parse(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        pass  # it is stricter: large numbers, NaN; and json says better what is wrong
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecordError("invalid_utf8", f"not UTF-8 (byte {error.start} of the line)") from None
    except (RecursionError, ValueError) as error:
        raise RecordError("invalid_json", f"not JSON{json_fault(error)}{_other_layout(line)}") from None


def _other_layout(line: bytes) -> str:
    """What a line that is no JSON looks like instead."""
    if b"\r" in line.strip():
        return "; lines end in carriage returns alone here, write line feeds"
    return "; write one record a line, not an array" if line.lstrip()[:1] == b"[" else ""
