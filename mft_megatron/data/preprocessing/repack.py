"""Packing stored samples again, without tokenising: for another length, with other options, or merged.

The samples of a data set do not depend on a length. Packing one for a second length adds a few arrays and an entry to
its ledger; merging copies the samples of several data sets, task by task.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mft_megatron.data.chat_templates.examples import first_examples, moved
from mft_megatron.data.chat_templates.trained_format import difference_notes, merged_sources
from mft_megatron.data.packing.build_packs import write_packs
from mft_megatron.data.packing.packing_options import SPLITS, PackingOptions, check_packing_options
from mft_megatron.data.packing.packs import pack_files
from mft_megatron.data.storage.arrays import check_files
from mft_megatron.data.storage.dataset_writer import DatasetWriter, report_full_disk, require_free_space
from mft_megatron.data.storage.indexed_dataset import IndexedDataset
from mft_megatron.data.storage.ledger import FORMAT_VERSION, JsonObject, Ledger, TaskEntry, read_ledger
from mft_megatron.data.storage.sample_writer import SampleWriter, TaskTally
from mft_megatron.data.storage.stored_samples import SAMPLES_AT_ONCE, StoredSamples, read_stored_samples
from mft_megatron.data.storage.weights import TOKEN_WEIGHTS, load_sample_weights, load_token_weights
from mft_megatron.errors import InputError


def add_length(prefix: str, options: PackingOptions) -> tuple[Ledger, list[str]]:
    """Pack the data set ``prefix`` for ``options.seq_length``, in addition to its lengths or instead of the same one.

    Returns:
        ledger: the new one.
        notices: lines that the user should read.

    Raises:
        InputError: there is no such data set, options contradict each other or the data, or the disk is full.
    """
    before = read_ledger(prefix)
    check_packing_options(options, before.tasks)
    check_files(prefix, before.arrays, hashes=False)
    length = str(options.seq_length)
    with report_full_disk(Path(prefix)), DatasetWriter(prefix) as files:
        entry, notices = write_packs(read_stored_samples(prefix, before), options, files)
        of_length = {suffix for split in SPLITS for suffix in pack_files(split, options.seq_length)}
        for suffix, array in before.arrays.items():
            if suffix not in of_length:
                files.keep(suffix, array)
        lengths = {**before.lengths, length: entry}
        # the entry has what readers of an older version would not know
        ledger = dataclasses.replace(before, lengths=lengths, arrays=files.entries(), format_version=FORMAT_VERSION)
        files.publish(ledger)
    return ledger, notices


def merge(prefixes: Sequence[str], output_prefix: Path, options: PackingOptions) -> tuple[Ledger, list[str]]:
    """Merge the tasks of several data sets; a task that is in more than one has the samples of all.

    Returns:
        ledger: of the merged data set.
        notices: lines that the user should read.

    Raises:
        InputError: data sets of different tokenizers or chat formats, the output among the inputs, or as
            :func:`add_length`.
    """
    twice = [prefix for n, prefix in enumerate(prefixes) if Path(prefix).resolve() in _resolved(prefixes[:n])]
    if twice:
        raise InputError(f"--data-path {twice[0]}: is given twice")
    ledgers = {prefix: read_ledger(prefix) for prefix in prefixes}
    _refuse_different(ledgers, output_prefix)
    check_packing_options(options)
    for prefix, ledger in ledgers.items():
        check_files(prefix, ledger.arrays, hashes=False)
    first = next(iter(ledgers.values()))
    suffixes = ("_input_ids.bin", "_loss_mask.bin", f"{TOKEN_WEIGHTS}.bin")
    needed = sum(
        ledger.arrays[suffix].size for ledger in ledgers.values() for suffix in suffixes if suffix in ledger.arrays
    )
    require_free_space(output_prefix.parent, needed)
    with report_full_disk(output_prefix), DatasetWriter(output_prefix) as files:
        stored = _copy(ledgers, files)
        entry, notices = write_packs(stored, options, files)
        ledger = Ledger(
            tasks=list(stored.tasks),
            tokenizer=first.tokenizer,
            chat_template=_chat_template(list(ledgers.values()), [task.name for task in stored.tasks]),
            lengths={str(options.seq_length): entry},
            arrays=files.entries(),
        )
        files.publish(ledger)
    return ledger, [*notices, *difference_notes(ledger)]


def _chat_template(ledgers: Sequence[Ledger], names: Sequence[str]) -> JsonObject:
    """The first data set's chat format, the stop tokens of all, and the templates of all where all are known."""
    first = {name: value for name, value in ledgers[0].chat_template.items() if name != "sources"}
    eos = ledgers[0].tokenizer.eos_token_id
    stops = {stop for ledger in ledgers for stop in ledger.chat_template["stop_token_ids"]} - {eos}
    sources = merged_sources(ledgers, names)
    return {**first, "stop_token_ids": [eos, *sorted(stops)], **({} if sources is None else {"sources": sources})}


def _resolved(prefixes: Sequence[str]) -> set[Path]:
    return {Path(prefix).resolve() for prefix in prefixes}


def _refuse_different(ledgers: dict[str, Ledger], output_prefix: Path) -> None:
    (first_prefix, first), *others = ledgers.items()
    for prefix, ledger in others:
        if ledger.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise InputError(
                f"--data-path {prefix}: made with another tokenizer ({ledger.tokenizer.model}) than {first_prefix} "
                f"({first.tokenizer.model}); preprocess one of them again"
            )
    known = [(prefix, ledger.tokenizer) for prefix, ledger in ledgers.items() if ledger.tokenizer.beginning_key]
    for prefix, tokenizer in known:
        if tokenizer.beginning_key != known[0][1].beginning_key:
            raise InputError(
                f"--data-path {prefix}: its tokenizer ({tokenizer.model}) begins texts otherwise than that of "
                f"{known[0][0]} ({known[0][1].model}), by the tokenizer_config.json beside each; preprocess one of "
                "them again"
            )
    for prefix in ledgers:
        if Path(prefix).resolve() == output_prefix.resolve():
            raise InputError(f"--output-prefix {output_prefix}: is one of the data sets to merge; choose a new one")


def _copy(ledgers: dict[str, Ledger], files: DatasetWriter) -> StoredSamples:
    """Copy the samples of all data sets, task by task."""
    writer = SampleWriter(files, next(iter(ledgers.values())).tokenizer.vocab_size)
    names = list(dict.fromkeys(task.name for ledger in ledgers.values() for task in ledger.tasks))
    try:
        for name in names:
            tally: TaskTally | None = None
            for prefix, ledger in ledgers.items():
                index = next((n for n, task in enumerate(ledger.tasks) if task.name == name), None)
                if index is None:
                    continue
                task = ledger.tasks[index]
                if tally is None:
                    tally = TaskTally(name, task.encoding, task.weight, task.sampling, task.overlong)
                    writer.begin(tally)
                _add_counts(tally, task, prefix)
                first = sum(before.kept for before in ledger.tasks[:index])
                ids, mask = (IndexedDataset(f"{prefix}_{kind}") for kind in ("input_ids", "loss_mask"))
                sample_weights = load_sample_weights(prefix, ledger.arrays)
                token_weights = load_token_weights(prefix, ledger.arrays)
                for start in range(first, first + task.kept, SAMPLES_AT_ONCE):
                    end = min(start + SAMPLES_AT_ONCE, first + task.kept)
                    items, lengths = ids.read(start, end)
                    of_tokens = None if token_weights is None else token_weights.read(start, end)[0]
                    of_samples = None if sample_weights is None else sample_weights[start:end]
                    writer.add(items, mask.read(start, end)[0], lengths, of_tokens, of_samples)
        return writer.finish()
    finally:
        writer.close()


def _add_counts(tally: TaskTally, task: TaskEntry, prefix: str) -> None:
    # an older data set lacks keys of the encoding; their value is None
    pairs = {key: (tally.encoding.get(key), task.encoding.get(key)) for key in {**tally.encoding, **task.encoding}}
    pairs |= {what: (getattr(tally, what), getattr(task, what)) for what in ("weight", "sampling", "overlong")}
    for what, (before, here) in pairs.items():
        if before != here:
            raise InputError(
                f"--data-path {prefix}: task {task.name} was made with {what} {here}, and with {before} in a data set "
                "before it; preprocess one of them again"
            )
    tally.samples_in += task.samples_in
    tally.documents += task.kept if task.documents else 0
    tally.filled += task.filled
    tally.added += task.added
    tally.chats = None if tally.chats is None or task.chats is None else tally.chats + task.chats
    tally.examples = first_examples([*tally.examples, *moved(task.examples, tally.kept)])
    tally.unread_keys.update(task.unread_keys)
    tally.noted.update(task.noted)
    tally.dropped.update(task.dropped)
    tally.sources += task.sources
