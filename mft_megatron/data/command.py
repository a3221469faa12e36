"""The command lines of ``tools/preprocess_data.py``, ``tools/pack_data.py`` and ``tools/inspect_data.py``."""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mft_megatron.data.chat_templates.formats import FORMATS
from mft_megatron.data.packing.build_packs import PackingOptions
from mft_megatron.data.packing.cutting import OVERLONG
from mft_megatron.data.packing.packs import PADDING_MODES
from mft_megatron.data.preprocessing.preprocess import Recipe, preprocess
from mft_megatron.data.preprocessing.repack import add_length, merge
from mft_megatron.data.storage.ledger import Ledger, read_ledger
from mft_megatron.data.tasks.task_file import read_task_file
from mft_megatron.data.tasks.task_files import TaskFiles, parse_tasks
from mft_megatron.data.tokenizers.backends import BACKENDS
from mft_megatron.data.tokenizers.load import TOKENIZERS
from mft_megatron.errors import InputError
from mft_megatron.options import option, read_groups, read_options

from .inspect import check, ledger_table, show_histograms, show_samples


@dataclasses.dataclass(frozen=True)
class PackingArguments:
    """How stored samples become rows."""

    seq_length: int = option(None, "Tokens of a row.", at_least=2, at_most=1 << 24, required=True)
    split: str = option("98,2,0", "Weights of train, valid and test; each task is split so.", metavar="T,V,T")
    seed: int = option(1234, "Seed of the split, of sampling and of fill-in-the-middle.")
    overlong: str = option(
        "drop",
        "What becomes of samples longer than a row, counted in any case: left out; cut at the end or at the beginning; "
        "cut into windows that overlap by one token, so that every target counts once.",
        choices=OVERLONG,
    )
    padding_mode: str = option(
        "pack",
        "What a row is: several whole samples; one sample, rows being as long as the longest of a micro-batch; or, for "
        "tasks of text alone, a cutting from all documents joined.",
        choices=PADDING_MODES,
        aliases=("--padding_mode",),
    )
    packing: str = option("mixed", "Whether a row may hold samples of several tasks.", choices=("mixed", "per-task"))
    task_sampling: tuple[str, ...] | None = option(
        None,
        "Epochs of a task in one pass over the training rows, as in NAME=2 or NAME=0.5; 1 where nothing is said.",
        repeated=True,
        metavar="NAME=RATIO",
    )
    sampling_temperature: float | None = option(
        None,
        "Give tasks shares in proportion to their samples to the power of 1/T; the number of samples stays the same.",
        at_least=1,
        metavar="T",
    )
    sampling_max_epochs: float | None = option(
        None, "No task is used more often than this in one pass.", above=0, metavar="EPOCHS"
    )
    sampling_epochs: int = option(
        1, "Epochs that one pass stands for; ratios that are no whole numbers come out even over them.", at_least=1
    )

    def parsed(self) -> PackingOptions:
        """The options, parsed.

        Raises:
            InputError: a malformed split or ratio.
        """
        return PackingOptions(
            seq_length=self.seq_length,
            split=_split_weights(self.split),
            seed=self.seed,
            overlong=self.overlong,
            padding_mode=self.padding_mode,
            packing=self.packing,
            task_sampling=_ratios(self.task_sampling or ()),
            sampling_temperature=self.sampling_temperature,
            sampling_max_epochs=self.sampling_max_epochs,
            sampling_epochs=self.sampling_epochs,
        )


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """Files: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, Megatron's .idx with .bin; or folders of them. Records: messages;
    chat_rounds; conversations; instruction(+input)+output; prompt+completion; question+answer; text."""

    task: tuple[str, ...] | None = option(
        None,
        "A task: its name and its file or folder. Give the option once a task or file, or several words.",
        repeated=True,
        metavar="NAME=PATH",
    )
    task_file: str | None = option(
        None,
        "YAML file of tasks: name, path or paths; as wanted, format, template, weight, sampling, overlong, fim_rate.",
        metavar="YAML",
    )
    on_error: str = option(
        "stop",
        "What becomes of a record that cannot be used: stop there, or skip and count it.",
        choices=("stop", "skip"),
    )


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """How records become tokens, and which of them are learnt."""

    tokenizer_type: str = option("HuggingFaceTokenizer", "Kind of tokenizer.", choices=tuple(TOKENIZERS))
    tokenizer_model: str = option(
        None, "Hugging Face folder with tokenizer.json, or SentencePiece .model file.", metavar="PATH", required=True
    )
    tokenizer_backend: str = option(
        "auto",
        "Library that tokenises; auto takes the fastest that proves equal to the tokenizer's own.",
        choices=BACKENDS,
    )
    chat_template: str = option(
        "auto",
        f"How chat turns are written: {', '.join(FORMATS)}, a .jinja file, or auto, the tokenizer's own template where "
        "it has one. Raw records (prompt+completion, text) have no template.",
        metavar="NAME|FILE",
    )
    role_markers: str | None = option(
        None,
        'What opens the turns of a role, as JSON: \'{"user": "<s>human\\n", "assistant": "<s>bot\\n"}\'.',
        aliases=("--role_markers",),
        metavar="JSON",
    )
    supervise: str = option(
        "all", "Which of the assistant's turns are learnt; a record may except turns.", choices=("all", "last")
    )
    add_bos: bool = option(False, "Begin every sample that has no template of its own with the BOS token.")
    fim_rate: float = option(
        0.0,
        "Share of text and prompt+completion records to turn into fill-in-the-middle.",
        at_least=0,
        at_most=1,
        aliases=("--fim_rate",),
    )
    fim_spm_rate: float = option(
        0.5, "Share of those that begin with the suffix (SPM).", at_least=0, at_most=1, aliases=("--fim_spm_rate",)
    )
    fim_tokens: str | None = option(
        None,
        "Prefix, suffix and middle token; found by themselves for the model families that have them.",
        metavar="P,S,M",
    )


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """Where to write, and with what."""

    output_prefix: str = option(
        None, "Where to write: files PREFIX_… and the ledger PREFIX_dataset.json.", metavar="PREFIX", required=True
    )
    workers: int = option(1, "Processes that tokenise; the result does not depend on it.", at_least=1)
    cache_dir: str | None = option(
        None,
        "Keep what has been tokenised here, by content: a task that is added or a file that grows costs no more than "
        "what is new. It may be removed at any time. Without it only a run that was killed goes on from what it had.",
        metavar="DIR",
    )


def preprocess_main(command_line: Sequence[str]) -> None:
    """Run ``tools/preprocess_data.py``."""
    groups = [("tasks", TaskOptions), ("text", TextOptions), ("packing", PackingArguments), ("output", OutputOptions)]
    options = read_groups(groups, command_line, "preprocess_data.py")
    tasks, text, packing, output = (
        options[TaskOptions],
        options[TextOptions],
        options[PackingArguments],
        options[OutputOptions],
    )
    recipe = Recipe(
        tasks=_tasks(tasks.task, tasks.task_file),
        on_error=tasks.on_error,
        packing=packing.parsed(),
        output_prefix=_output(output.output_prefix),
        workers=output.workers,
        cache_dir=None if output.cache_dir is None else Path(output.cache_dir),
        progress=_show_progress if sys.stderr.isatty() else lambda task, done, total: None,
        **dataclasses.asdict(text),
    )
    with _ended_by_sigterm():
        ledger, notices = preprocess(recipe)
    _tell(ledger, notices, output.output_prefix)


@dataclasses.dataclass(frozen=True)
class DataSetOptions:
    """Stored samples are packed without tokenising. One data set: for one more length, or the same with other options.
    Several: merged into a new one. Packing options that are not given are those the first data set was packed with."""

    data_path: tuple[str, ...] = option(None, "Data sets, by their --output-prefix.", metavar="PREFIX", required=True)
    output_prefix: str | None = option(
        None, "Where to write the merged data set; one data set alone is packed in its place.", metavar="PREFIX"
    )


def pack_main(command_line: Sequence[str]) -> None:
    """Run ``tools/pack_data.py``."""
    groups = [("data sets", DataSetOptions), ("packing", PackingArguments)]
    options = read_groups(groups, command_line, "pack_data.py", _packed_before)
    sets, packing = options[DataSetOptions], options[PackingArguments]
    if sets.output_prefix is None and len(sets.data_path) > 1:
        raise InputError("--data-path: several data sets are merged into a new one; give it an --output-prefix")
    if sets.output_prefix is None:
        ledger, notices = add_length(sets.data_path[0], packing.parsed())
    else:
        ledger, notices = merge(sets.data_path, _output(sets.output_prefix), packing.parsed())
    _tell(ledger, notices, sets.output_prefix or sets.data_path[0])


def _packed_before(given: Mapping[str, Any]) -> dict[str, Any]:
    """The packing options of the first data set, as a command line would give them."""
    if "data_path" not in given:
        return {}
    ledger = read_ledger(given["data_path"][0])
    options = dataclasses.asdict(PackingOptions.from_entry(next(iter(ledger.lengths.values())), given["data_path"][0]))
    options["split"] = ",".join(map(repr, options["split"]))
    options["task_sampling"] = tuple(f"{name}={ratio}" for name, ratio in options["task_sampling"].items()) or None
    sampling = [name for name in options if "sampling" in name]
    left_out = {"seq_length"}
    if given.get("padding_mode") == "concat" or any(name in given for name in sampling):
        left_out.update(sampling)  # they belong together
    return {name: value for name, value in options.items() if value is not None and name not in left_out}


def _tell(ledger: Ledger, notices: Sequence[str], prefix: str) -> None:
    print(ledger_table(ledger))
    for notice in notices:
        print(f"note: {notice}")
    print(f"wrote {prefix}_dataset.json and {len(ledger.arrays)} files beside it")


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as an interrupt from the keyboard does: workers and files are looked after."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tasks(words: tuple[str, ...] | None, task_file: str | None) -> dict[str, TaskFiles]:
    if words is None and task_file is None:
        raise InputError("missing option: give --task or --task-file; see --help")
    tasks = {} if task_file is None else read_task_file(task_file)
    for name, source in parse_tasks(words or ()).items():
        if name in tasks:
            raise InputError(f"--task {name}: the task is in {task_file}, too; name its files in one of them")
        tasks[name] = source
    return tasks


def _output(prefix: str) -> Path:
    if prefix.endswith("/") or Path(prefix).is_dir():
        raise InputError(f"--output-prefix {prefix}: is a folder; add the first part of the files' names")
    return Path(prefix)


def _split_weights(text: str) -> tuple[float, float, float]:
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    if len(weights) != 3 or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise InputError(f"--split {text}: give three weights that are not negative, e.g. 98,2,0")
    return weights


def _ratios(words: Sequence[str]) -> dict[str, float]:
    ratios: dict[str, float] = {}
    for word in words:
        name, equals, text = word.rpartition("=")
        try:
            ratio = float(text)
        except ValueError:
            ratio = -1.0
        if not equals or not name or not 0 < ratio < float("inf"):
            raise InputError(f"--task-sampling {word}: give NAME=RATIO with a ratio above 0, e.g. completion=0.5")
        if name in ratios:
            raise InputError(f"--task-sampling {word}: task {name} is given twice")
        ratios[name] = ratio
    return ratios


def _show_progress(task: str, done: int, total: int) -> None:
    end = "\n" if done >= total else ""
    print(f"\r{task}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB", end=end, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class InspectOptions:
    """Shows a packed data set: its ledger, and samples with their supervised tokens marked."""

    samples: int = option(1, "Samples to show of each task.", at_least=0)
    histograms: bool = option(False, "Show how long the samples of each task are.")
    check: bool = option(False, "Read everything again: hashes, counts and packs against the ledger.")


def inspect_main(command_line: Sequence[str]) -> None:
    """Run ``tools/inspect_data.py PREFIX``."""
    words = list(command_line)
    prefix = words.pop(0) if words and not words[0].startswith("-") else None
    options = read_options(InspectOptions, words, "inspect_data.py", usage="inspect_data.py PREFIX [options]")
    if prefix is None:
        raise InputError("missing argument: give the data set's prefix first; see --help")
    ledger = read_ledger(prefix)
    print(ledger_table(ledger))
    if options.check:
        check(prefix, ledger)
        print("check: every hash, count and pack agrees with the ledger")
    if options.histograms:
        for text in show_histograms(prefix, ledger):
            print(text)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for text in show_samples(prefix, ledger, options.samples, colour):
        print(text)
