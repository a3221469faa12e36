"""Offline preprocessing: task files become a packed data set with its ledger.

::

    files ─► batches ─► workers: encode, or read the cache ─► stored samples: ids, masks, tasks ─► packs ─► ledger

The result depends neither on the number of workers nor on the cache. Everything is written under temporary names; when
all of it is on disk, the files are renamed, the ledger last. A run that fails leaves an existing data set as it was;
one that was killed continues, when it is started again, from the batches that are in the cache.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from mft_megatron.data.chat_templates.examples import first_examples, moved
from mft_megatron.data.chat_templates.formats import ChatFormat
from mft_megatron.data.chat_templates.trained_format import chat_sources, difference_notes, has_tokenized_files
from mft_megatron.data.packing.build_packs import write_packs
from mft_megatron.data.packing.packing_options import check_packing_options
from mft_megatron.data.records.conversation import Conversation, Turn
from mft_megatron.data.records.ignored_keys import parse_ignored_keys
from mft_megatron.data.records.notes import note_lines
from mft_megatron.data.storage.dataset_writer import DatasetWriter, report_full_disk, require_free_space
from mft_megatron.data.storage.ledger import Ledger, TaskEntry, TokenizerEntry
from mft_megatron.data.storage.sample_writer import SampleWriter, TaskTally
from mft_megatron.data.storage.stored_samples import StoredSamples
from mft_megatron.data.tasks.task_files import left_out_lines
from mft_megatron.data.tokenizers.backend_names import REFERENCE
from mft_megatron.data.tokenizers.backends import BackendMismatch
from mft_megatron.data.tokenizers.tokenizer import Tokenizer
from mft_megatron.errors import InputError

from .encoded_batch import EncodedBatch
from .read_input import EncodedInput, ReadInput
from .recipe import Prepared, Recipe, bytes_needed, describe, prepare, stop_token_ids


def preprocess(recipe: Recipe) -> tuple[Ledger, list[str]]:
    """Write the data set of ``recipe``.

    Returns:
        ledger: of the data set.
        notices: lines that the user should read.

    Raises:
        InputError: a record that cannot be used (``file:line``), a task whose mask cannot be right or of which nothing
            is left, a tokenizer or chat format that cannot be used, contradicting options, a full disk.
    """
    return with_reference_if_wrong(recipe, _make)


Made = TypeVar("Made")


def with_reference_if_wrong(
    recipe: Recipe, make: Callable[[Recipe, str], tuple[Made, list[str]]]
) -> tuple[Made, list[str]]:
    """Make something with the tokenizer's fast backend, and once more with the reference if that proves wrong.

    Args:
        recipe: of a data set.
        make: gets the recipe and the name of a backend; returns what it made and lines for the user.

    Raises:
        InputError: options that contradict each other, or as ``make``.
    """
    check_packing_options(recipe.packing)
    _refuse_output_as_input(recipe)
    try:
        return make(recipe, recipe.tokenizer_backend)
    except BackendMismatch as mismatch:
        if recipe.tokenizer_backend != "auto":
            raise InputError(f"{mismatch}; use --tokenizer-backend auto") from None
        made, notices = make(recipe, REFERENCE)
        return made, [f"{mismatch}; everything was tokenised again by the reference", *notices]


def _refuse_output_as_input(recipe: Recipe) -> None:
    output = f"{recipe.output_prefix.resolve()}_"
    for name, task in recipe.tasks.items():
        for file in task.files:
            if file.suffix == ".idx" and str(file.resolve()).startswith(output):
                raise InputError(
                    f"task {name}: {file} is of the data set that --output-prefix {recipe.output_prefix} names; choose "
                    "another prefix"
                )


def _make(recipe: Recipe, backend: str) -> tuple[Ledger, list[str]]:
    prepared = prepare(recipe, backend)
    require_free_space(recipe.output_prefix.parent, bytes_needed(recipe, prepared))
    with (
        report_full_disk(recipe.output_prefix),
        DatasetWriter(recipe.output_prefix) as files,
        ReadInput(recipe, prepared, files.cache_folder) as encoded,
    ):
        ledger, notices = write_data_set(recipe, prepared, encoded, files)
    if encoded.reused:
        notices.append(f"{encoded.reused} batches had been tokenised before and were used again")
    note = prepared.tokenizer.backend_note
    return ledger, [*([note] if note else []), *notices]


def write_data_set(
    recipe: Recipe, prepared: Prepared, encoded: EncodedInput, files: DatasetWriter
) -> tuple[Ledger, list[str]]:
    """Write the samples of all tasks, pack them and publish the data set.

    Args:
        recipe: of the data set.
        prepared: what it names.
        encoded: the input.
        files: of the data set.

    Returns:
        ledger: of the data set.
        notices: lines that the user should read.

    Raises:
        InputError: as :func:`preprocess`.
    """
    tokenizer = prepared.tokenizer
    stored = _store(recipe, prepared, encoded, files)
    entry, notices = write_packs(stored, recipe.packing, files)
    notices += left_out_lines(recipe.tasks.values())
    notices += _chosen_formats(recipe, prepared, stored.tasks)
    notices += encoded.notes.values()
    ignored = parse_ignored_keys(recipe.ignore_keys)
    for task in stored.tasks:
        notices += note_lines(task.name, task.unread_keys, task.noted, ignored)
    seen = {key for task in stored.tasks for key in task.unread_keys}
    notices += [f"--ignore-keys {key}: no record that is used has this key" for key in ignored if key not in seen]
    default = prepared.styles[recipe.chat_template]
    style_of = {name: encoding.style for name, encoding in prepared.encodings.items()}
    ledger = Ledger(
        tasks=list(stored.tasks),
        tokenizer=_tokenizer_entry(tokenizer),
        chat_template={
            "name": default.name,
            "fingerprint": default.fingerprint,
            "stop_token_ids": stop_token_ids(
                tokenizer, _formats_of_chats(stored.tasks, style_of), prepared.encodings.values()
            ),
            "sources": chat_sources(stored.tasks, style_of, tokenizer, recipe.add_bos),
        },
        lengths={str(recipe.packing.seq_length): entry},
        arrays=files.entries(),
    )
    files.publish(ledger)
    return ledger, [*notices, *difference_notes(ledger)]


def _chosen_formats(recipe: Recipe, prepared: Prepared, tasks: Sequence[TaskEntry]) -> list[str]:
    """Name the format that ``auto`` chose for chats because the tokenizer has no template."""
    automatic = [
        task.name
        for task in tasks
        if task.chats and (recipe.tasks[task.name].template or recipe.chat_template) == "auto"
    ]
    if prepared.tokenizer.chat_template is not None or not automatic:
        return []
    style = prepared.encodings[automatic[0]].style
    opening = style.prompt(Conversation((Turn("user", "…"),)), 1)
    return [
        f"the tokenizer has no chat template, so the chats of {', '.join(automatic)} are written as {style.name} does "
        f"({opening!r}); choose another format with --chat-template"
    ]


def _formats_of_chats(tasks: Sequence[TaskEntry], style_of: Mapping[str, ChatFormat]) -> list[ChatFormat]:
    """Formats of the tasks that have chats, or files that were tokens already, which may be chats."""
    return [style_of[task.name] for task in tasks if task.chats or has_tokenized_files(task)]


def _store(recipe: Recipe, prepared: Prepared, encoded: EncodedInput, files: DatasetWriter) -> StoredSamples:
    """Write the samples of all tasks."""
    writer = SampleWriter(files, prepared.tokenizer.vocab_size)
    try:
        for name, task in recipe.tasks.items():
            encoding = prepared.encodings[name]
            tally = TaskTally(name, describe(encoding, recipe), task.weight, task.sampling, task.overlong)
            writer.begin(tally)
            stop = stop_token_ids(prepared.tokenizer, [encoding.style], [encoding])
            for batch in encoded.batches(name):
                _count(batch, tally, stop)
                writer.add(batch.ids, batch.mask, batch.lengths, batch.token_weights, batch.sample_weights)
            tally.sources += encoded.sources(name)
            _refuse_wrong_masks(tally)
        return writer.finish()
    finally:
        writer.close()


def _count(encoded: EncodedBatch, tally: TaskTally, stop_ids: list[int]) -> None:
    tally.dropped.update(drop.reason for drop in encoded.drops)
    tally.samples_in += encoded.records
    tally.documents += encoded.documents
    tally.filled += encoded.filled
    tally.added += encoded.added
    tally.chats = (tally.chats or 0) + encoded.chats
    tally.examples = first_examples([*tally.examples, *moved(encoded.examples, tally.kept)])
    tally.unread_keys.update(encoded.notes.unread_keys)
    tally.noted.update(encoded.notes.kinds)
    if not tally.stopped:
        tally.stopped = any(bool(encoded.mask[encoded.ids == stop].any()) for stop in stop_ids)


def _refuse_wrong_masks(tally: TaskTally) -> None:
    """Refuse a task of which nothing is left, or whose mask cannot be intended."""
    paths = ", ".join(source.path for source in tally.sources)
    if tally.kept == 0:
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(tally.dropped.items())) or "no record at all"
        raise InputError(
            f"task {tally.name} ({paths}) is empty: {tally.samples_in} records, none kept ({reasons}); correct its "
            "files, or leave the task out"
        )
    if tally.documents == tally.kept:
        return
    if tally.supervised_tokens == tally.tokens - tally.kept:
        raise InputError(
            f"task {tally.name} ({paths}): every token of its samples is supervised, so nothing is asked; give text "
            "records if that is meant, or correct the prompts"
        )
    if not tally.stopped:
        remedy = f"choose another --chat-template than {tally.encoding['template']}"
        if tally.encoding["supervise"] == "no-tool-calls":
            remedy = (
                "--supervise no-tool-calls learns no end of a call; give answers without calls, too, or learn calls"
            )
        raise InputError(
            f"task {tally.name} ({paths}): no token that ends a turn is supervised, so a model would never learn to "
            f"stop; {remedy}"
        )


def _tokenizer_entry(tokenizer: Tokenizer) -> TokenizerEntry:
    return TokenizerEntry(
        type=tokenizer.type,
        model=tokenizer.model,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        beginning_key=tokenizer.beginning_key,
    )
