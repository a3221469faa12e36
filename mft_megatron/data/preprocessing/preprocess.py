"""Offline preprocessing: task files become a packed data set with its ledger.

::

    files ─► batches ─► workers (encoding, or parts from before) ─► store: ids, masks, tasks ─► packs ─► ledger

The result does not depend on the number of workers, nor on what was reused. Everything is written under temporary
names; only when all of it is on disk do the files take their places, the ledger last. A run that fails leaves an
existing data set as it was; one that is killed goes on, when it is started again, from the parts it had encoded.
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mft_megatron.data.chat_templates.formats import ChatFormat, chat_format
from mft_megatron.data.packing.build_packs import write_packs
from mft_megatron.data.packing.packing_options import PackingOptions, check_packing_options
from mft_megatron.data.records.fim import fim
from mft_megatron.data.storage.dataset_writer import DatasetWriter, report_full_disk, require_free_space
from mft_megatron.data.storage.indexed_dataset import token_dtype
from mft_megatron.data.storage.ledger import Ledger, TokenizerEntry
from mft_megatron.data.storage.sample_writer import SampleWriter, TaskTally
from mft_megatron.data.storage.stored_samples import StoredSamples
from mft_megatron.data.tasks.reader import TaskReader, files_on_disk
from mft_megatron.data.tasks.task_files import TaskFiles
from mft_megatron.data.tokenizers.backends import REFERENCE, BackendMismatch
from mft_megatron.data.tokenizers.load import load_tokenizer
from mft_megatron.data.tokenizers.tokenizer import Tokenizer
from mft_megatron.errors import InputError

from .encoded_cache import EncodedCache
from .encoding import EncodedBatch, TaskEncoding
from .workers import Workers

COMPRESSED = {".gz": 4, ".zst": 4, ".parquet": 3}  # how much larger the text is, roughly
BYTES_A_TOKEN = 4  # of text, roughly; only to see beforehand whether the disk is far too small


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to make: the options of ``tools/preprocess_data.py``, parsed.

    ``on_error``: "stop" at the first record that cannot be used, or "skip" and count it. ``cache_dir``: where encoded
    parts are kept for later runs; without it they are kept only while this run is not complete. ``progress``: called
    with task, bytes read and bytes in all.
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
    add_bos: bool = False
    fim_rate: float = 0.0
    fim_spm_rate: float = 0.5
    fim_tokens: str | None = None
    on_error: str = "stop"
    workers: int = 1
    cache_dir: Path | None = None
    progress: Callable[[str, int, int], None] = lambda task, done, total: None


def preprocess(recipe: Recipe) -> tuple[Ledger, list[str]]:
    """Make the data set of ``recipe``; returns its ledger, and lines that the user should read.

    Raises:
        InputError: a record that cannot be used (``file:line``), a task whose mask cannot be right or of which nothing
            is left, a tokenizer or chat format that cannot be used, contradicting options, a full disk.
    """
    check_packing_options(recipe.packing)
    _refuse_own_output(recipe)
    try:
        return _make(recipe, recipe.tokenizer_backend)
    except BackendMismatch as mismatch:
        if recipe.tokenizer_backend != "auto":
            raise InputError(f"{mismatch}; use --tokenizer-backend auto") from None
        ledger, notices = _make(recipe, REFERENCE)
        return ledger, [f"{mismatch}; everything was tokenised again by the reference", *notices]


def _refuse_own_output(recipe: Recipe) -> None:
    own = f"{recipe.output_prefix.resolve()}_"
    for name, source in recipe.tasks.items():
        for file in source.files:
            if file.suffix == ".idx" and str(file.resolve()).startswith(own):
                raise InputError(
                    f"task {name}: {file} is of the data set that --output-prefix {recipe.output_prefix} names; choose "
                    "another prefix"
                )


def _make(recipe: Recipe, backend: str) -> tuple[Ledger, list[str]]:
    tokenizer = load_tokenizer(recipe.tokenizer_type, recipe.tokenizer_model, backend)
    templates = {recipe.chat_template, *(source.template or recipe.chat_template for source in recipe.tasks.values())}
    styles = {name: chat_format(name, tokenizer, recipe.role_markers, recipe.supervise) for name in sorted(templates)}
    encodings = {name: _encoding(recipe, source, tokenizer, styles) for name, source in recipe.tasks.items()}
    require_free_space(recipe.output_prefix.parent, _bytes_needed(recipe, tokenizer))
    with report_full_disk(recipe.output_prefix), DatasetWriter(recipe.output_prefix) as files:
        parts = EncodedCache(recipe.cache_dir or files.cache_folder)
        try:
            stored = _store(recipe, tokenizer, encodings, files, parts)
            entry, notices = write_packs(stored, recipe.packing, files)
            default = styles[recipe.chat_template]
            ledger = Ledger(
                tasks=list(stored.tasks),
                tokenizer=_tokenizer_entry(tokenizer),
                chat_template={
                    "name": default.name,
                    "fingerprint": default.fingerprint,
                    "stop_token_ids": stop_token_ids(tokenizer, styles.values()),
                },
                lengths={str(recipe.packing.seq_length): entry},
                arrays=files.entries(),
            )
            files.publish(ledger)
        except Exception:
            if recipe.cache_dir is None:
                parts.remove()
            raise
        if recipe.cache_dir is None:
            parts.remove()
    if parts.reused:
        notices.append(f"{parts.reused} parts had been tokenised before and were used again")
    return ledger, [*([tokenizer.backend_note] if tokenizer.backend_note else []), *notices]


def _encoding(recipe: Recipe, source: TaskFiles, tokenizer: Tokenizer, styles: dict[str, ChatFormat]) -> TaskEncoding:
    rate = recipe.fim_rate if source.fim_rate is None else source.fim_rate
    cut = fim(tokenizer, rate, recipe.fim_spm_rate, recipe.fim_tokens, recipe.packing.seed) if rate > 0 else None
    return TaskEncoding(styles[source.template or recipe.chat_template], source.record_format, cut, recipe.add_bos)


def describe(encoding: TaskEncoding, recipe: Recipe) -> dict[str, Any]:
    """What decides how records become samples, for the ledger; samples of one task are made alike."""
    cut = encoding.fim
    return {
        "template": encoding.style.name,
        "fingerprint": encoding.style.fingerprint,
        "role_markers": recipe.role_markers,
        "supervise": recipe.supervise,
        "format": encoding.record_format,
        "add_bos": encoding.add_bos,
        "fim_rate": 0.0 if cut is None else cut.rate,
        "fim_spm_rate": None if cut is None else cut.spm_rate,
        "fim_tokens": None if cut is None else list(cut.tokens),
    }


def _bytes_needed(recipe: Recipe, tokenizer: Tokenizer) -> int:
    """Roughly what the stored samples and the parts they are made from take."""
    files = (part for source in recipe.tasks.values() for file in source.files for part in files_on_disk(file))
    text = sum(file.stat().st_size * COMPRESSED.get(file.suffix, 1) for file in files)
    return 2 * (token_dtype(tokenizer.vocab_size).itemsize + 1) * text // BYTES_A_TOKEN


def _store(
    recipe: Recipe, tokenizer: Tokenizer, encodings: dict[str, TaskEncoding], files: DatasetWriter, parts: EncodedCache
) -> StoredSamples:
    """Write the samples of all tasks."""
    writer = SampleWriter(files, tokenizer.vocab_size)
    try:
        with Workers(recipe.workers, tokenizer, encodings, parts) as workers:
            for name, source in recipe.tasks.items():
                style = encodings[name].style
                description = describe(encodings[name], recipe)
                tally = TaskTally(name, description, source.weight, source.sampling, source.overlong)
                writer.begin(tally)
                stop = stop_token_ids(tokenizer, [style])
                readers = [TaskReader(file) for file in source.files]
                total = sum(reader.size_on_disk for reader in readers)
                for reader in readers:
                    for encoded in workers.encode(name, reader.batches()):
                        _take(encoded, tally, stop, recipe.on_error)
                        writer.add(encoded.ids, encoded.mask, encoded.lengths)
                        recipe.progress(name, sum(one.bytes_read for one in readers), total)
                    tally.sources.append(reader.entry())
                _refuse_wrong_masks(tally)
        return writer.finish()
    finally:
        writer.close()


def _take(encoded: EncodedBatch, tally: TaskTally, stop_ids: list[int], on_error: str) -> None:
    for drop in encoded.drops:
        if on_error == "stop":
            raise InputError(
                f"{drop.path}:{drop.line}: {drop.message}; correct it, or leave such records out with --on-error skip"
            )
        tally.dropped[drop.reason] += 1
    tally.samples_in += encoded.records
    tally.documents += encoded.documents
    tally.filled += encoded.filled
    if not tally.stopped:
        tally.stopped = bool(encoded.mask[np.isin(encoded.ids, stop_ids)].any())


def _refuse_wrong_masks(tally: TaskTally) -> None:
    """Refuse a task of which nothing is left, or whose mask cannot be what anybody wants."""
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


def stop_token_ids(tokenizer: Tokenizer, styles: Iterable[ChatFormat]) -> list[int]:
    """Ids at which generation is to stop: end of text, and what ends a turn where the vocabulary has a token for it."""
    stops = {tokenizer.token_id(style.stop_token) for style in styles}
    return [tokenizer.eos_token_id, *sorted(stops - {None, tokenizer.eos_token_id})]
