"""The recipe of a data set: the options of ``tools/preprocess_data.py``, and what they name, opened."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from mft_megatron.data.chat_templates.formats import ChatFormat, chat_format
from mft_megatron.data.packing.packing_options import PackingOptions
from mft_megatron.data.records.fim import make_fim
from mft_megatron.data.records.ignored_keys import parse_ignored_keys
from mft_megatron.data.storage.indexed_dataset import token_dtype
from mft_megatron.data.storage.ledger import JsonObject
from mft_megatron.data.tasks.task_files import TaskFiles
from mft_megatron.data.tasks.tokenized_file import files_on_disk
from mft_megatron.data.tokenizers.load import load_tokenizer
from mft_megatron.data.tokenizers.tokenizer import Tokenizer
from mft_megatron.errors import InputError

from .encoding import TaskEncoding

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


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The tokenizer and the formats that a recipe names, opened.

    Attributes:
        tokenizer: of the data set.
        styles: chat formats, by the name that the recipe gives.
        encodings: of each task, by its name.
    """

    tokenizer: Tokenizer
    styles: Mapping[str, ChatFormat]
    encodings: Mapping[str, TaskEncoding]


def prepare(recipe: Recipe, backend: str) -> Prepared:
    """Open the tokenizer and the chat formats of a recipe.

    Raises:
        InputError: one of them cannot be used, or two options exclude each other.
    """
    if recipe.split_thinking_rounds and recipe.supervise == "last":
        raise InputError(
            "--split-thinking-rounds learns the answers of every round, --supervise last those of the last one alone; "
            "leave one of them out"
        )
    rates = {name: recipe.fim_rate if task.fim_rate is None else task.fim_rate for name, task in recipe.tasks.items()}
    fills = [name for name, rate in rates.items() if rate > 0]
    if fills and recipe.supervise == "tool-calls-only":
        raise InputError(
            f"--supervise tool-calls-only leaves out raw text, and fill-in-the-middle of task {fills[0]} is raw text; "
            "leave one of them out"
        )
    tokenizer = load_tokenizer(recipe.tokenizer_type, recipe.tokenizer_model, backend)
    templates = {recipe.chat_template, *(task.template or recipe.chat_template for task in recipe.tasks.values())}
    how = recipe.role_markers, recipe.supervise, recipe.learn_empty_answers
    styles = {name: chat_format(name, tokenizer, *how) for name in sorted(templates)}
    encodings = {name: _encoding(recipe, task, tokenizer, styles) for name, task in recipe.tasks.items()}
    return Prepared(tokenizer, styles, encodings)


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


def bytes_needed(recipe: Recipe, prepared: Prepared) -> int:
    """Estimate the bytes of the stored samples and the cached batches."""
    files = (part for task in recipe.tasks.values() for file in task.files for part in files_on_disk(file))
    text = sum(file.stat().st_size * COMPRESSED.get(file.suffix, 1) for file in files)
    return 2 * (token_dtype(prepared.tokenizer.vocab_size).itemsize + 1) * text // BYTES_A_TOKEN


def stop_token_ids(tokenizer: Tokenizer, styles: Iterable[ChatFormat], encodings: Iterable[TaskEncoding]) -> list[int]:
    """Ids that end generation: end of text, and where the vocabulary has them tokens that end a turn or a middle."""
    names = {style.stop_token for style in styles} | {task.fim.family.end for task in encodings if task.fim is not None}
    stops = {stop for name in names if (stop := tokenizer.token_id(name)) is not None}
    return [tokenizer.eos_token_id, *sorted(stops - {tokenizer.eos_token_id})]
