"""The command lines of ``tools/preprocess_data.py``, ``tools/pack_data.py`` and ``tools/inspect_data.py``.

Each command imports what it needs when its options have been read, so that ``--help`` and a mistyped option are
answered at once, and no command waits for the modules of another.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft_megatron.data.packing.packing_options import PackingOptions
from mft_megatron.data.storage.ledger import Ledger, read_ledger
from mft_megatron.errors import InputError
from mft_megatron.options import read_groups, read_options

from .command_options import DataSetOptions, InspectOptions, OutputOptions, PackingArguments, TaskOptions, TextOptions
from .ledger_table import ledger_table

if TYPE_CHECKING:
    from mft_megatron.data.preprocessing.part_entry import PartEntry
    from mft_megatron.data.tasks.task_files import TaskFiles


def preprocess_main(command_line: Sequence[str]) -> None:
    """Run ``tools/preprocess_data.py``."""
    groups = [("tasks", TaskOptions), ("text", TextOptions), ("packing", PackingArguments), ("output", OutputOptions)]
    options = read_groups(groups, command_line, "preprocess_data.py")
    tasks, output = options[TaskOptions], options[OutputOptions]
    from mft_megatron.data.preprocessing.part_entry import parse_part
    from mft_megatron.data.preprocessing.parts import preprocess_part
    from mft_megatron.data.preprocessing.preprocess import preprocess
    from mft_megatron.data.preprocessing.recipe import Recipe

    recipe = Recipe(
        tasks=_tasks(tasks.task, tasks.task_file),
        on_error=tasks.on_error,
        packing=options[PackingArguments].parsed(),
        output_prefix=_output_prefix(output.output_prefix),
        workers=output.workers,
        cache_dir=None if output.cache_dir is None else Path(output.cache_dir),
        progress=_show_progress if sys.stderr.isatty() else lambda task, done, total: None,
        **dataclasses.asdict(options[TextOptions]),
    )
    part = None if output.part is None else parse_part(output.part)
    with _sigterm_interrupts():
        if part is None:
            ledger, notices = preprocess(recipe)
            _report(ledger, notices, output.output_prefix)
        else:
            entry, notices = preprocess_part(recipe, part)
            _report_part(entry, notices, output.output_prefix)


def pack_main(command_line: Sequence[str]) -> None:
    """Run ``tools/pack_data.py``."""
    groups = [("data sets", DataSetOptions), ("packing", PackingArguments)]
    options = read_groups(groups, command_line, "pack_data.py", _previous_packing)
    sets, packing = options[DataSetOptions], options[PackingArguments]
    from mft_megatron.data.preprocessing.merged_parts import merged_parts
    from mft_megatron.data.preprocessing.part_entry import delete_parts, has_parts
    from mft_megatron.data.preprocessing.parts import merge_parts
    from mft_megatron.data.preprocessing.repack import add_length, merge

    if sets.output_prefix is None and len(sets.data_path) > 1:
        raise InputError("--data-path: several data sets are merged into a new one; give it an --output-prefix")
    if sets.output_prefix is None:
        merged = merged_parts(sets.data_path[0])
        make = merge_parts if has_parts(sets.data_path[0]) and not merged else add_length
        ledger, notices = make(sets.data_path[0], packing.parsed())
        if merged:
            delete_parts(sets.data_path[0], merged)
            notices.append(f"the data set had been merged before; {len(merged)} parts that were left were deleted")
    else:
        ledger, notices = merge(sets.data_path, _output_prefix(sets.output_prefix), packing.parsed())
    _report(ledger, notices, sets.output_prefix or sets.data_path[0])


def inspect_main(command_line: Sequence[str]) -> None:
    """Run ``tools/inspect_data.py PREFIX``."""
    words = list(command_line)
    prefix = words.pop(0) if words and not words[0].startswith("-") else None
    options = read_options(InspectOptions, words, "inspect_data.py", usage="inspect_data.py PREFIX [options]")
    if prefix is None:
        raise InputError("missing argument: give the data set's prefix first; see --help")
    from mft_megatron.data.records.notes import note_lines

    from .inspect import check, show_histograms, show_samples
    from .inspect_packs import parse_packs, show_packs

    packs = None if options.packs is None else parse_packs(options.packs)
    if packs is None and options.seq_length is not None:
        raise InputError("--seq-length has no effect without --packs; add that, or leave it out")
    ledger = read_ledger(prefix, option="")
    print(ledger_table(ledger))
    for task in ledger.tasks:
        for line in note_lines(task.name, task.unread_keys, task.noted, task.encoding.get("ignore_keys") or ()):
            print(f"note: {line}")
    if options.check:
        check(prefix, ledger)
        print("check: every hash, count and pack agrees with the ledger")
    if options.histograms:
        for text in show_histograms(prefix, ledger):
            print(text)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if packs is None:
        shown = show_samples(prefix, ledger, options.samples, colour)
    else:
        shown = show_packs(prefix, ledger, packs, options.seq_length, colour)
    for text in shown:
        print(text)


def _previous_packing(given: Mapping[str, Any]) -> dict[str, Any]:
    """Packing options of the first data set, as a command line would give them.

    Args:
        given: values of the command line, by field name.
    """
    if "data_path" not in given:
        return {}
    from mft_megatron.data.preprocessing.merged_parts import merged_parts
    from mft_megatron.data.preprocessing.part_entry import has_parts
    from mft_megatron.data.preprocessing.parts import packing_of_parts

    prefix = given["data_path"][0]
    parts = "output_prefix" not in given and has_parts(prefix)
    if parts and not merged_parts(prefix):
        previous = packing_of_parts(prefix)
    else:
        previous = PackingOptions.from_entry(next(iter(read_ledger(prefix).lengths.values())), prefix)
    options = dataclasses.asdict(previous)
    options["split"] = ",".join(map(repr, options["split"]))
    options["task_sampling"] = tuple(f"{name}={ratio}" for name, ratio in options["task_sampling"].items()) or None
    sampling = [name for name in options if "sampling" in name]
    left_out = set() if parts else {"seq_length"}
    if {options["padding_mode"], given.get("padding_mode", "pack")} != {"pack"}:
        left_out.add("packer")  # of rows that are not packed it means nothing
    if given.get("padding_mode") == "concat" or any(name in given for name in sampling):
        left_out.update(sampling)  # sampling options depend on each other
    return {name: value for name, value in options.items() if value is not None and name not in left_out}


def _report(ledger: Ledger, notices: Sequence[str], prefix: str) -> None:
    print(ledger_table(ledger))
    for notice in notices:
        print(f"note: {notice}")
    print(f"wrote {prefix}_dataset.json and {len(ledger.arrays)} files beside it")


def _report_part(entry: "PartEntry", notices: Sequence[str], prefix: str) -> None:
    number, count = entry.part.number, entry.part.count
    print(f"part {number} of {count}: {len(entry.sizes):,} of {sum(entry.batches.values()):,} batches of the input")
    for notice in notices:
        print(f"note: {notice}")
    print(f"when all parts are there, merge them: pack_data.py --data-path {prefix}")


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM end the block as an interrupt from the keyboard does, so that workers and files are cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tasks(words: tuple[str, ...] | None, task_file: str | None) -> "dict[str, TaskFiles]":
    from mft_megatron.data.tasks.task_file import read_task_file
    from mft_megatron.data.tasks.task_files import parse_tasks

    if words is None and task_file is None:
        raise InputError("missing option: give --task or --task-file; see --help")
    tasks = {} if task_file is None else read_task_file(task_file)
    for name, files in parse_tasks(words or ()).items():
        if name in tasks:
            raise InputError(f"--task {name}: the task is in {task_file}, too; name its files in one of them")
        tasks[name] = files
    return tasks


def _output_prefix(prefix: str) -> Path:
    if prefix.endswith("/") or Path(prefix).is_dir():
        raise InputError(f"--output-prefix {prefix}: is a folder; add the first part of the files' names")
    return Path(prefix)


def _show_progress(task: str, done: int, total: int) -> None:
    end = "\n" if done >= total else ""
    print(f"\r{task}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB", end=end, file=sys.stderr, flush=True)
