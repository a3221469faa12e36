"""Offline preprocessing: task files become a packed data set with its ledger.

::

    files ─► batches ─► workers: encode, or read the cache ─► stored samples: ids, masks, tasks ─► packs ─► ledger

The result depends neither on the number of workers nor on the cache. Everything is written under temporary names; when
all of it is on disk, the files are renamed, the ledger last. A run that fails leaves an existing data set as it was;
one that was killed continues, when it is started again, from the batches that are in the cache.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from mft_megatron.data.chat_templates.examples import first_examples, moved
from mft_megatron.data.chat_templates.formats import ChatFormat, chat_format
from mft_megatron.data.chat_templates.trained_format import chat_sources, has_tokenized_files, trained_format
from mft_megatron.data.packing.build_packs import write_packs
from mft_megatron.data.packing.packing_options import PackingOptions, check_packing_options
from mft_megatron.data.records.conversation import Conversation, Turn
from mft_megatron.data.records.fim import make_fim
from mft_megatron.data.records.ignored_keys import parse_ignored_keys
from mft_megatron.data.records.notes import note_lines
from mft_megatron.data.storage.dataset_writer import DatasetWriter, report_full_disk, require_free_space
from mft_megatron.data.storage.indexed_dataset import token_dtype
from mft_megatron.data.storage.ledger import JsonObject, Ledger, TaskEntry, TokenizerEntry
from mft_megatron.data.storage.sample_writer import SampleWriter, TaskTally
from mft_megatron.data.storage.stored_samples import StoredSamples
from mft_megatron.data.tasks.reader import TaskReader
from mft_megatron.data.tasks.task_files import TaskFiles, left_out_lines
from mft_megatron.data.tasks.tokenized_file import files_on_disk
from mft_megatron.data.tokenizers.backend_names import REFERENCE
from mft_megatron.data.tokenizers.backends import BackendMismatch
from mft_megatron.data.tokenizers.load import load_tokenizer
from mft_megatron.data.tokenizers.tokenizer import Tokenizer
from mft_megatron.errors import InputError

from .encoded_batch import EncodedBatch
from .encoded_cache import EncodedCache
from .encoding import TaskEncoding
from .generation_prompts import GenerationPrompts
from .workers import Workers

# bytes of text per byte of the file, roughly
COMPRESSED = {".gz": 4, ".zst": 4, ".parquet": 3}
# bytes of text per token, roughly: a disk that is far too small is reported before anything is written
BYTES_A_TOKEN = 4


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The options of ``tools/preprocess_data.py``, parsed; fields have the names of the options.

    Attributes:
        tasks: by name.
        packing: options of packing.
        on_error: "stop" at the first record that cannot be used, or "skip" and count it.
        workers: number of processes.
        cache_dir: folder of encoded batches for later runs; where it is ``None``, they are kept until this run is
            complete.
        progress: called with the name of the task, its bytes that were read, and its total bytes.
    """

    tasks: dict[str, TaskFiles]
    tokenizer_type: str
    tokenizer_model: str
    output_prefix: Path
    packing: PackingOptions
    tokenizer_backend: str = "auto"
    chat_template: str = "auto"
    role_markers: str | None = None
    supervise: str = "all"
    learn_empty_answers: bool = False
    ignore_keys: str | None = None
    add_bos: bool = False
    split_thinking_rounds: bool = False
    fim_rate: float = 0.0
    fim_spm_rate: float | None = None
    fim_tokens: str | None = None
    on_error: str = "stop"
    workers: int = 1
    cache_dir: Path | None = None
    progress: Callable[[str, int, int], None] = lambda task, done, total: None


def preprocess(recipe: Recipe) -> tuple[Ledger, list[str]]:
    """Write the data set of ``recipe``.

    Returns:
        ledger: of the data set.
        notices: lines that the user should read.

    Raises:
        InputError: a record that cannot be used (``file:line``), a task whose mask cannot be right or of which nothing
            is left, a tokenizer or chat format that cannot be used, contradicting options, a full disk.
    """
    check_packing_options(recipe.packing)
    _refuse_output_as_input(recipe)
    try:
        return _make(recipe, recipe.tokenizer_backend)
    except BackendMismatch as mismatch:
        if recipe.tokenizer_backend != "auto":
            raise InputError(f"{mismatch}; use --tokenizer-backend auto") from None
        ledger, notices = _make(recipe, REFERENCE)
        return ledger, [f"{mismatch}; everything was tokenised again by the reference", *notices]


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
    tokenizer = load_tokenizer(recipe.tokenizer_type, recipe.tokenizer_model, backend)
    templates = {recipe.chat_template, *(task.template or recipe.chat_template for task in recipe.tasks.values())}
    how = recipe.role_markers, recipe.supervise, recipe.learn_empty_answers
    styles = {name: chat_format(name, tokenizer, *how) for name in sorted(templates)}
    encodings = {name: _encoding(recipe, task, tokenizer, styles) for name, task in recipe.tasks.items()}
    ignored = parse_ignored_keys(recipe.ignore_keys)
    require_free_space(recipe.output_prefix.parent, _bytes_needed(recipe, tokenizer))
    with report_full_disk(recipe.output_prefix), DatasetWriter(recipe.output_prefix) as files:
        cache = EncodedCache(recipe.cache_dir or files.cache_folder)
        try:
            prompts = {name: GenerationPrompts(name, tokenizer, encoding) for name, encoding in encodings.items()}
            stored = _store(recipe, tokenizer, encodings, prompts, files, cache)
            entry, notices = write_packs(stored, recipe.packing, files)
            notices += left_out_lines(recipe.tasks.values())
            notices += _chosen_formats(recipe, tokenizer, encodings, stored.tasks)
            notices += [watched.note for watched in prompts.values() if watched.note is not None]
            for task in stored.tasks:
                notices += note_lines(task.name, task.unread_keys, task.noted, ignored)
            seen = {key for task in stored.tasks for key in task.unread_keys}
            notices += [f"--ignore-keys {key}: no record has this key" for key in ignored if key not in seen]
            default = styles[recipe.chat_template]
            style_of = {name: encoding.style for name, encoding in encodings.items()}
            ledger = Ledger(
                tasks=list(stored.tasks),
                tokenizer=_tokenizer_entry(tokenizer),
                chat_template={
                    "name": default.name,
                    "fingerprint": default.fingerprint,
                    "stop_token_ids": stop_token_ids(
                        tokenizer, _formats_of_chats(stored.tasks, style_of), encodings.values()
                    ),
                    "sources": chat_sources(stored.tasks, style_of, tokenizer, recipe.add_bos),
                },
                lengths={str(recipe.packing.seq_length): entry},
                arrays=files.entries(),
            )
            files.publish(ledger)
            if (trained := trained_format(ledger)) is not None and trained.difference:
                notices.append(trained.difference)
        except Exception:
            if recipe.cache_dir is None:
                cache.remove()
            raise
        if recipe.cache_dir is None:
            cache.remove()
    if cache.reused:
        notices.append(f"{cache.reused} batches had been tokenised before and were used again")
    return ledger, [*([tokenizer.backend_note] if tokenizer.backend_note else []), *notices]


def _formats_of_chats(tasks: Sequence[TaskEntry], style_of: Mapping[str, ChatFormat]) -> list[ChatFormat]:
    """Formats of the tasks that have chats, or files that were tokens already, which may be chats."""
    return [style_of[task.name] for task in tasks if task.chats or has_tokenized_files(task)]


def _encoding(recipe: Recipe, task: TaskFiles, tokenizer: Tokenizer, styles: dict[str, ChatFormat]) -> TaskEncoding:
    rate = recipe.fim_rate if task.fim_rate is None else task.fim_rate
    cut = make_fim(tokenizer, rate, recipe.fim_spm_rate, recipe.fim_tokens, recipe.packing.seed) if rate > 0 else None
    return TaskEncoding(
        styles[task.template or recipe.chat_template],
        task.record_format,
        cut,
        recipe.add_bos,
        parse_ignored_keys(recipe.ignore_keys),
        recipe.split_thinking_rounds,
    )


def describe(encoding: TaskEncoding, recipe: Recipe) -> JsonObject:
    """Describe for the ledger everything that decides how the records of a task become samples."""
    cut = encoding.fim
    return {
        "template": encoding.style.name,
        "fingerprint": encoding.style.fingerprint,
        "role_markers": recipe.role_markers,
        "supervise": recipe.supervise,
        "format": encoding.record_format,
        "add_bos": encoding.add_bos,
        "split_thinking_rounds": encoding.split_thinking_rounds or None,
        "fim_rate": 0.0 if cut is None else cut.rate,
        "fim_spm_rate": None if cut is None else cut.spm_rate,
        "fim_tokens": None if cut is None else list(cut.family.tokens),
        "fim_end": None if cut is None else cut.family.end,
        "ignore_keys": list(encoding.ignored_keys) or None,
        "learn_empty_answers": recipe.learn_empty_answers or None,
    }


def _bytes_needed(recipe: Recipe, tokenizer: Tokenizer) -> int:
    """Rough size of the stored samples and the cached batches."""
    files = (part for task in recipe.tasks.values() for file in task.files for part in files_on_disk(file))
    text = sum(file.stat().st_size * COMPRESSED.get(file.suffix, 1) for file in files)
    return 2 * (token_dtype(tokenizer.vocab_size).itemsize + 1) * text // BYTES_A_TOKEN


def _chosen_formats(
    recipe: Recipe, tokenizer: Tokenizer, encodings: Mapping[str, TaskEncoding], tasks: Sequence[TaskEntry]
) -> list[str]:
    """Name the format that ``auto`` chose for chats because the tokenizer has no template."""
    automatic = [
        task.name
        for task in tasks
        if task.chats and (recipe.tasks[task.name].template or recipe.chat_template) == "auto"
    ]
    if tokenizer.chat_template is not None or not automatic:
        return []
    style = encodings[automatic[0]].style
    opening = style.prompt(Conversation((Turn("user", "…"),)), 1)
    return [
        f"the tokenizer has no chat template, so the chats of {', '.join(automatic)} are written as {style.name} does "
        f"({opening!r}); choose another format with --chat-template"
    ]


def _store(
    recipe: Recipe,
    tokenizer: Tokenizer,
    encodings: dict[str, TaskEncoding],
    prompts: Mapping[str, GenerationPrompts],
    files: DatasetWriter,
    cache: EncodedCache,
) -> StoredSamples:
    """Write the samples of all tasks."""
    writer = SampleWriter(files, tokenizer.vocab_size)
    try:
        with Workers(recipe.workers, tokenizer, encodings, cache) as workers:
            for name, task in recipe.tasks.items():
                description = describe(encodings[name], recipe)
                tally = TaskTally(name, description, task.weight, task.sampling, task.overlong)
                writer.begin(tally)
                stop = stop_token_ids(tokenizer, [encodings[name].style], [encodings[name]])
                readers = [TaskReader(file) for file in task.files]
                total = sum(reader.size_on_disk for reader in readers)
                for reader in readers:
                    for encoded in workers.encode(name, prompts[name].watch(reader.batches())):
                        _count(encoded, tally, stop, recipe.on_error)
                        writer.add(encoded.ids, encoded.mask, encoded.lengths)
                        recipe.progress(name, sum(other.bytes_read for other in readers), total)
                    tally.sources.append(reader.entry())
                _refuse_wrong_masks(tally)
        return writer.finish()
    finally:
        writer.close()


def _count(encoded: EncodedBatch, tally: TaskTally, stop_ids: list[int], on_error: str) -> None:
    for drop in encoded.drops:
        if on_error == "stop":
            raise InputError(
                f"{drop.position}: {drop.message}; correct it, or leave such records out with --on-error skip"
            )
        tally.dropped[drop.reason] += 1
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
        raise InputError(
            f"task {tally.name} ({paths}): no token that ends a turn is supervised, so a model would never learn to "
            f"stop; choose another --chat-template than {tally.encoding['template']}"
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
    )


def stop_token_ids(tokenizer: Tokenizer, styles: Iterable[ChatFormat], encodings: Iterable[TaskEncoding]) -> list[int]:
    """Ids that end generation: end of text, and where the vocabulary has them tokens that end a turn or a middle."""
    names = {style.stop_token for style in styles} | {task.fim.family.end for task in encodings if task.fim is not None}
    stops = {stop for name in names if (stop := tokenizer.token_id(name)) is not None}
    return [tokenizer.eos_token_id, *sorted(stops - {tokenizer.eos_token_id})]
