"""Records to token ids and loss masks: the part of preprocessing that runs in worker processes.

One call encodes a batch of records and returns a few arrays and a list of dropped records, so that little data crosses
between processes. The same records give the same result in every process.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mft_megatron.data.chat_templates.examples import FIRST, example_of, first_examples
from mft_megatron.data.chat_templates.format_names import shown_format
from mft_megatron.data.chat_templates.formats import ChatFormat
from mft_megatron.data.chat_templates.jinja_messages import strings_in
from mft_megatron.data.chat_templates.token_names import names_of_text, names_pattern
from mft_megatron.data.records.conversation import Conversation, RecordError, Turn
from mft_megatron.data.records.fim import Fim
from mft_megatron.data.records.json_values import refuse_repeated_keys
from mft_megatron.data.records.notes import RecordNotes
from mft_megatron.data.records.record_formats import read_record
from mft_megatron.data.records.record_lines import parse_record
from mft_megatron.data.records.rounds import split_rounds
from mft_megatron.data.records.segments import LEFT_OUT, Segment
from mft_megatron.data.tasks.record_batches import RecordBatch, position
from mft_megatron.data.tokenizers.backends import BackendMismatch
from mft_megatron.data.tokenizers.tokenizer import Tokenizer
from mft_megatron.errors import InputError

from .batched_texts import BatchedSamples, KnownTexts, SampleError
from .encoded_batch import Drop, EncodedBatch, drop_unsupervised
from .prompt_spaces import with_prompt_spaces

# records of each batch that are looked at for repeated keys: those that write them do so in all records
_LOOKED_AT = 16


@dataclasses.dataclass(frozen=True)
class TaskEncoding:
    """How the records of a task become samples.

    Attributes:
        style: chat format.
        record_format: a key of :data:`mft_megatron.data.records.record_formats.RECORD_FORMATS`, or "auto".
        fim: how documents are written as fill-in-the-middle; ``None`` for never.
        add_bos: every sample begins with the bos token, once.
        ignored_keys: paths of keys that records are read without.
        split_thinking_rounds: a conversation with reasoning in several rounds becomes a sample of each round.
    """

    style: ChatFormat
    record_format: str = "auto"
    fim: Fim | None = None
    add_bos: bool = False
    ignored_keys: tuple[str, ...] = ()
    split_thinking_rounds: bool = False

    @property
    def fingerprint(self) -> str:
        """Text of every field, which decide together how a record becomes samples."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return repr({**fields, "style": self.style.fingerprint})


@dataclasses.dataclass
class _ReadRecords:
    """Samples of the records of a batch that are used, and what is known of each.

    Attributes:
        samples: the samples.
        lines: of their records in the file.
        documents: whether it is a document.
        filled: whether it is written as fill-in-the-middle.
        chats: whether it is a chat.
        weights: of the sample.
        examples: with the index of their sample.
        of_record: notes of the record that is being read; empty before it.
        noted: notes of each record that has some, with its first sample and the one after its last.
        added: samples beyond one a record.
    """

    samples: BatchedSamples
    lines: list[int] = dataclasses.field(default_factory=list)
    documents: list[bool] = dataclasses.field(default_factory=list)
    filled: list[bool] = dataclasses.field(default_factory=list)
    chats: list[bool] = dataclasses.field(default_factory=list)
    weights: list[float] = dataclasses.field(default_factory=list)
    examples: list[tuple[int, dict[str, Any]]] = dataclasses.field(default_factory=list)
    of_record: RecordNotes = dataclasses.field(default_factory=RecordNotes)
    noted: list[tuple[int, int, RecordNotes]] = dataclasses.field(default_factory=list)
    added: int = 0

    def notes(self, kept: list[bool]) -> RecordNotes:
        """Sum the notes of the records of which a sample is kept."""
        notes = RecordNotes()
        for start, end, of_record in self.noted:
            if any(kept[start:end]):
                notes.add(of_record)
        return notes


class Encoder:
    """Encodes batches of records of several tasks with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, tasks: Mapping[str, TaskEncoding]):
        """Prepare for the encodings of ``tasks``, by name.

        Raises:
            InputError: samples are to begin with a token that the tokenizer does not have.
        """
        self._tokenizer = tokenizer
        self._tasks = tasks
        self._ends_turns = {name: tokenizer.token_id(task.style.stop_token) is not None for name, task in tasks.items()}
        self._texts = KnownTexts(tokenizer)
        if tokenizer.bos_token_id is None and any(task.add_bos for task in tasks.values()):
            raise InputError("--add-bos: the tokenizer names no BOS token; leave the option out, or name one to it")

    @functools.cached_property
    def _names_of_text(self) -> frozenset[str]:
        return names_of_text(self._tokenizer)

    @functools.cached_property
    def _names(self) -> list[re.Pattern[str]]:
        # one for each first character, as a search for a fixed beginning is several times as fast as for any of several
        by_first = itertools.groupby(sorted(self._names_of_text), key=lambda name: name[0])
        return [names_pattern(tuple(names)) for _, names in by_first]

    def encode(self, task: str, batch: RecordBatch) -> EncodedBatch:
        """Encode a batch of a task; records that cannot be used are in ``drops``.

        Raises:
            InputError: a chat record, and a tokenizer without the token that ends a turn.
            BackendMismatch: the tokenizer's fast backend tokenises a text otherwise than its reference.
        """
        encoding = self._tasks[task]
        read = _ReadRecords(BatchedSamples(self._texts))
        drops: list[Drop] = []
        records = 0
        for number, line in enumerate(batch.lines, batch.first_line):
            if isinstance(line, bytes) and (not line or line.isspace()):
                continue
            records += 1
            try:
                if records <= _LOOKED_AT:
                    refuse_repeated_keys(line)
                self._read(task, batch, number, line, read)
            except RecordError as error:
                drops.append(Drop(batch.path, number, error.reason, str(error), batch.of_array))
                read.of_record = RecordNotes()
        try:
            arrays = read.samples.arrays(self._tokenizer.bos_token_id if encoding.add_bos else None)
        except SampleError as error:
            where = position(batch.path, read.lines[error.sample], batch.of_array)
            raise BackendMismatch(
                f"{where}: {error} by {self._tokenizer.backend} and {self._tokenizer.reference}"
            ) from None
        samples, kept, unsupervised = drop_unsupervised(arrays, batch.path, read.lines, batch.of_array)
        weights = np.array(read.weights, np.float32)[kept]
        drops = sorted([*drops, *unsupervised], key=lambda drop: drop.line)
        documents_kept, filled_kept, chats_kept = (
            int(np.count_nonzero(kept & np.array(of, bool))) for of in (read.documents, read.filled, read.chats)
        )
        kept_examples = first_examples(
            {"sample": int(np.count_nonzero(kept[:sample])), **example}
            for sample, example in read.examples
            if kept[sample]
        )
        return EncodedBatch(
            ids=samples.ids,
            mask=samples.mask,
            lengths=samples.lengths,
            records=records,
            documents=documents_kept,
            drops=drops,
            filled=filled_kept,
            notes=read.notes(kept.tolist()),
            chats=chats_kept,
            examples=kept_examples,
            added=read.added,
            token_weights=samples.weights,
            sample_weights=weights if (weights != 1).any() else None,
        )

    def _read(
        self, task: str, batch: RecordBatch, number: int, line: bytes | dict[str, Any], read: "_ReadRecords"
    ) -> None:
        """Read one record and append its samples; when it returns, memory holds their texts alone.

        Raises:
            RecordError: it cannot be used.
            InputError: as :meth:`encode`.
        """
        encoding = self._tasks[task]
        start = len(read.lines)
        written = self._written(parse_record(line), encoding, read.of_record)
        read.added += len(written) - 1
        if any(self._has_name(conversation) for conversation, _, _ in written):
            read.of_record.kinds["token_names"] += 1
        for conversation, segments, filled in written:
            if not (conversation.raw or self._ends_turns[task]):
                raise InputError(
                    f"{position(batch.path, number, batch.of_array)}: a chat record, but the tokenizer has no token "
                    f"{encoding.style.stop_token} to end a turn of {shown_format(encoding.style.name)} with; use "
                    "mftcoder, or add the token"
                )
            if len(read.lines) < FIRST and not filled:  # of each batch, wherever in a file it is
                example = example_of(conversation, encoding.style, self._names_of_text)
                read.examples += [] if example is None else [(len(read.lines), example)]
            read.lines.append(number)
            read.documents.append(conversation.document)
            read.filled.append(filled)
            read.chats.append(not conversation.raw)
            read.weights.append(conversation.weight)
            read.samples.add(
                segments if conversation.raw else with_prompt_spaces(segments, self._tokenizer, encoding.add_bos)
            )
        if read.of_record:
            read.noted.append((start, len(read.lines), read.of_record))
            read.of_record = RecordNotes()

    def _written(
        self, record: Any, encoding: TaskEncoding, notes: RecordNotes
    ) -> list[tuple[Conversation, list[Segment], bool]]:
        """Write a record as samples: the conversation of each, its segments, and whether it is fill-in-the-middle.

        Raises:
            RecordError: the record cannot be used.
        """
        conversations = read_conversations(record, encoding, notes)
        if len(conversations) == 1:
            (conversation,) = conversations
            segments = _segments(encoding.style, conversation, notes)  # also where it is filled, as it may be refused
            filled = None if encoding.fim is None else _fim_segments(conversation, encoding.fim)
            if filled is not None:
                return [(conversation, filled, True)]
            if self._begins_twice(conversation):
                notes.kinds["two_bos"] += 1
            return [(conversation, segments, False)]
        written: list[tuple[Conversation, list[Segment], bool]] = []
        for conversation in conversations:
            try:
                written.append((conversation, _segments(encoding.style, conversation, notes), False))
            except RecordError as error:
                optional = error.reason in ("empty_answer", LEFT_OUT)
                if not optional or (not written and conversation is conversations[-1]):
                    raise
                if error.reason == LEFT_OUT:
                    continue
                learned = (turn.role == "assistant" and turn.learn for turn in conversation.turns)
                notes.kinds["empty_answer_not_learnt"] += sum(learned)
        notes.kinds["rounds_split"] += 1
        return written

    def _has_name(self, conversation: Conversation) -> bool:
        """Whether text of a record has the name of a token, which a server reads as that token."""
        # in a raw prompt the name is the token here, too
        texts = [turn.content for turn in conversation.turns if turn.role != "prompt"]
        for turn in conversation.turns:
            if turn.extra or turn.tool_calls:
                texts += strings_in([turn.extra, turn.tool_calls])
        if conversation.tools:
            texts += strings_in(conversation.tools)
        return any(pattern.search(text) for pattern in self._names for text in texts)

    def _begins_twice(self, conversation: Conversation) -> bool:
        """Whether a raw prompt begins with the BOS token that the tokenizer itself puts before it."""
        tokenizer, prompt = self._tokenizer, conversation.turns[0]
        if prompt.role != "prompt" or tokenizer.bos_token is None or not prompt.content.startswith(tokenizer.bos_token):
            return False
        return tokenizer.bos_token_id in tokenizer.beginning.ids


def _segments(style: ChatFormat, conversation: Conversation, notes: RecordNotes) -> list[Segment]:
    """Write a conversation; where a second or later system turn is why it cannot be written, the error says so."""
    try:
        return style.segments(conversation, notes)
    except RecordError as error:
        systems = [index for index, turn in enumerate(conversation.turns) if turn.role == "system"]
        if systems in ([], [0]):
            raise
        text = "\n\n".join(conversation.turns[index].content for index in systems)
        others = [turn for turn in conversation.turns if turn.role != "system"]
        try:
            style.segments(dataclasses.replace(conversation, turns=(Turn("system", text), *others)))
        except RecordError:
            raise error from None
        where = "a second system turn" if len(systems) > 1 else "a system turn after others"
        raise RecordError(
            error.reason,
            f"turn {systems[:2][-1]} is {where}, which {shown_format(style.name)} does not take "
            f"({str(error).partition(';')[0]}); put all system text into the first turn, or use a template that takes "
            "several, such as chatml",
        ) from None


def read_conversations(record: Any, encoding: TaskEncoding, notes: RecordNotes | None = None) -> list[Conversation]:
    """Read the conversations that become samples of a record: one, or one of each round with reasoning.

    Args:
        record: parsed.
        encoding: of its task.
        notes: counts that the record is added to.

    Raises:
        RecordError: the record cannot be used.
    """
    conversation = read_record(record, encoding.record_format, notes, encoding.ignored_keys)
    return split_rounds(conversation) if encoding.split_thinking_rounds else [conversation]


def _fim_segments(conversation: Conversation, fim: Fim) -> list[Segment] | None:
    # the content alone decides, so that the same record is written alike in every file
    key = "\0".join([turn.content for turn in conversation.turns]).encode()
    return fim.segments(conversation, key)
