"""The command lines of ``tools/preprocess_data.py`` and ``tools/inspect_data.py``."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mft_megatron.data.chat_format import FORMATS
from mft_megatron.data.encoding import OVERLONG
from mft_megatron.data.inspect import check, ledger_table, show_samples
from mft_megatron.data.ledger import read_ledger
from mft_megatron.data.preprocess import Recipe, preprocess
from mft_megatron.data.sources import parse_tasks
from mft_megatron.data.tokenizer import TOKENIZERS
from mft_megatron.errors import InputError
from mft_megatron.options import option, read_options


@dataclasses.dataclass(frozen=True)
class PreprocessOptions:
    """Records, one JSON object a line: messages; chat_rounds; instruction(+input)+output; prompt+completion; text."""

    task: tuple[str, ...] | None = option(
        None,
        "A task: its name and its .jsonl file, or a folder of them. Give the option once a task, or several words.",
        type=str,
        many=True,
        repeated=True,
        metavar="NAME=PATH",
    )
    tokenizer_type: str = option("HuggingFaceTokenizer", "Kind of tokenizer.", choices=tuple(TOKENIZERS))
    tokenizer_model: str | None = option(
        None, "Hugging Face folder with tokenizer.json, or SentencePiece .model file.", type=str, metavar="PATH"
    )
    chat_template: str = option(
        "chatml",
        "How chat turns are written. Raw records (prompt+completion, text) have no template.",
        choices=tuple(FORMATS),
    )
    role_markers: str | None = option(
        None,
        'What opens the turns of a role, as JSON: \'{"user": "<s>human\\n", "assistant": "<s>bot\\n"}\'.',
        type=str,
        aliases=("--role_markers",),
        metavar="JSON",
    )
    seq_length: int | None = option(None, "Tokens of a pack.", type=int, at_least=2)
    split: str = option("98,2,0", "Weights of train, valid and test; each task is split so.", metavar="T,V,T")
    seed: int = option(1234, "Seed of the split.")
    overlong: str = option("drop", "What becomes of samples longer than a pack; counted either way.", choices=OVERLONG)
    on_error: str = option(
        "stop",
        "What becomes of a record that cannot be used: stop there, or skip and count it.",
        choices=("stop", "skip"),
    )
    workers: int = option(1, "Processes that tokenise; the result does not depend on it.", at_least=1)
    output_prefix: str | None = option(
        None, "Where to write: files PREFIX_… and the ledger PREFIX_dataset.json.", type=str, metavar="PREFIX"
    )


def preprocess_main(command_line: Sequence[str]) -> None:
    """Run ``tools/preprocess_data.py``."""
    required = ("task", "tokenizer_model", "seq_length", "output_prefix")
    options = read_options(PreprocessOptions, command_line, "preprocess_data.py", required)
    if options.output_prefix.endswith("/") or Path(options.output_prefix).is_dir():
        raise InputError(
            f"--output-prefix {options.output_prefix}: is a folder; add the first part of the files' names"
        )
    ledger = preprocess(
        Recipe(
            tasks=parse_tasks(options.task),
            tokenizer_type=options.tokenizer_type,
            tokenizer_model=options.tokenizer_model,
            chat_template=options.chat_template,
            role_markers=options.role_markers,
            seq_length=options.seq_length,
            split=_split_weights(options.split),
            seed=options.seed,
            overlong=options.overlong,
            on_error=options.on_error,
            workers=options.workers,
            output_prefix=Path(options.output_prefix),
            progress=_show_progress if sys.stderr.isatty() else lambda task, done, total: None,
        )
    )
    print(ledger_table(ledger))
    print(f"wrote {options.output_prefix}_dataset.json and {len(ledger.arrays)} files beside it")


def _split_weights(text: str) -> tuple[float, float, float]:
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    if len(weights) != 3 or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise InputError(f"--split {text}: give three weights that are not negative, e.g. 98,2,0")
    return weights


def _show_progress(task: str, done: int, total: int) -> None:
    end = "\n" if done >= total else ""
    print(f"\r{task}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB", end=end, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class InspectOptions:
    """Shows a packed data set: its ledger, and samples with their supervised tokens marked."""

    samples: int = option(1, "Samples to show of each task.")
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
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for text in show_samples(prefix, ledger, options.samples, colour):
        print(text)
