"""Options of the data commands; the field's name is the option's name, its help is beside its default."""

import dataclasses
from collections.abc import Sequence

from mft_megatron.data.chat_templates.builtin_formats import FORMATS
from mft_megatron.data.packing.packing_options import PACKERS, PADDING_MODES, PackingOptions
from mft_megatron.data.records.segments import SUPERVISE
from mft_megatron.data.storage.ledger import OVERLONG
from mft_megatron.data.tokenizers.backend_names import BACKENDS
from mft_megatron.data.tokenizers.load import TOKENIZERS
from mft_megatron.errors import InputError
from mft_megatron.options import option


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """Files: .jsonl, .json, both also .gz or .zst, .parquet, Megatron's .idx with .bin; or folders. Records: messages;
    chat_rounds; conversations; instruction(+input)+output; prompt+completion; question+answer; text."""

    task: tuple[str, ...] | None = option(
        None,
        "A task: its name and its file or folder. Give the option once for each task or file, or with several words.",
        repeated=True,
        metavar="NAME=PATH",
    )
    task_file: str | None = option(
        None,
        "YAML file of tasks: name, path or paths; optionally format, template, weight, sampling, overlong, fim_rate.",
        metavar="YAML",
    )
    on_error: str = option(
        "stop", "At a record that cannot be used: stop, or skip and count it.", choices=("stop", "skip")
    )


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """How records become tokens, and which tokens are trained on."""

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
        f"How chat turns are written: {', '.join(FORMATS)}, a .jinja file, or auto: the tokenizer's own template if it "
        "has one. Raw records (prompt+completion, text) have no template.",
        metavar="NAME|FILE",
    )
    role_markers: str | None = option(
        None,
        'Text that opens the turns of a role, as JSON: \'{"user": "<s>human\\n", "assistant": "<s>bot\\n"}\'.',
        aliases=("--role_markers",),
        metavar="JSON",
    )
    supervise: str = option(
        "all",
        "What is trained on: all assistant turns, the last, all without their reasoning or without their tool calls, "
        "or tool calls alone; what is left out of a turn is context. A record may exclude or weight turns.",
        choices=SUPERVISE,
    )
    learn_empty_answers: bool = option(
        False, "Train on empty answers, too, which teach to stop at once; otherwise they are counted and not learnt."
    )
    ignore_keys: str | None = option(
        None,
        "Read records as if they did not have these keys: topic, or messages[].topic in turns. They are counted, but "
        "no note names them.",
        metavar="KEY,KEY",
    )
    split_thinking_rounds: bool = option(
        False,
        "Make one sample of each round of a chat with reasoning in earlier rounds, as a server gives it to the model: "
        "the history without reasoning, then the round with its own. Not with --supervise last.",
    )
    add_bos: bool = option(False, "Begin every sample with the BOS token, unless it begins with it already.")
    fim_rate: float = option(
        0.0,
        "Fraction of text and prompt+completion records to turn into fill-in-the-middle.",
        at_least=0,
        at_most=1,
        aliases=("--fim_rate",),
    )
    fim_spm_rate: float | None = option(
        None,
        "Fraction of these that begin with the suffix (SPM); without it as the model's family was trained: 0.5, 0 for "
        "Qwen and DeepSeek, 1 for Codestral.",
        at_least=0,
        at_most=1,
        aliases=("--fim_spm_rate",),
    )
    fim_tokens: str | None = option(
        None,
        "Prefix, suffix and middle token; recognised automatically for model families that have them, with the "
        "family's form and the token that ends the middle.",
        metavar="P,S,M",
    )


@dataclasses.dataclass(frozen=True)
class PackingArguments:
    """How stored samples become rows."""

    seq_length: int = option(None, "Tokens of a row.", at_least=2, at_most=1 << 24, required=True)
    split: str = option("98,2,0", "Weights of train, valid and test, for every task.", metavar="T,V,T")
    seed: int = option(1234, "Seed of the split, of sampling, of the packer and of fill-in-the-middle.")
    overlong: str = option(
        "drop",
        "Samples longer than a row, which are always counted: drop them, cut them at the end or at the beginning, or "
        "cut them into windows that overlap by one token, so that every target counts once.",
        choices=OVERLONG,
    )
    padding_mode: str = option(
        "pack",
        "A row holds: several whole samples; one sample, rows being as long as the longest of a micro-batch; or, for "
        "tasks of text alone, a section of all documents concatenated.",
        choices=PADDING_MODES,
        aliases=("--padding_mode",),
    )
    packing: str = option("mixed", "Whether a row may hold samples of several tasks.", choices=("mixed", "per-task"))
    packer: str | None = option(
        None,
        "How samples share training rows: mixed, the default, spreads the samples of each task evenly over the rows; "
        "decreasing goes from the longest sample to the shortest, so that short ones crowd into a few rows. Other "
        "splits are packed by decreasing length.",
        choices=PACKERS,
    )
    task_sampling: tuple[str, ...] | None = option(
        None,
        "Epochs of a task in one pass over the training rows, as in NAME=2 or NAME=0.5; 1 for tasks not named.",
        repeated=True,
        metavar="NAME=RATIO",
    )
    sampling_temperature: float | None = option(
        None,
        "Sample tasks in proportion to their number of samples to the power of 1/T; the total number stays the same.",
        at_least=1,
        metavar="T",
    )
    sampling_max_epochs: float | None = option(None, "Most epochs of any task in one pass.", above=0, metavar="EPOCHS")
    sampling_epochs: int = option(
        1, "Epochs in one pass; ratios that are not whole numbers are exact over all of them.", at_least=1
    )

    def parsed(self) -> PackingOptions:
        """Parse the options that are text.

        Raises:
            InputError: a malformed split or ratio, or a packer of rows that hold one sample or a section of documents.
        """
        if self.packer is not None and self.padding_mode != PADDING_MODES[0]:
            raise InputError(
                f"--packer {self.packer}: rows of --padding-mode {self.padding_mode} are not packed; leave it out"
            )
        return PackingOptions(
            seq_length=self.seq_length,
            split=_split_weights(self.split),
            seed=self.seed,
            overlong=self.overlong,
            padding_mode=self.padding_mode,
            packing=self.packing,
            packer=PACKERS[0] if self.packer is None else self.packer,
            task_sampling=_ratios(self.task_sampling or ()),
            sampling_temperature=self.sampling_temperature,
            sampling_max_epochs=self.sampling_max_epochs,
            sampling_epochs=self.sampling_epochs,
        )


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """Names of the output files, and processes that make them."""

    output_prefix: str = option(
        None, "Where to write: files PREFIX_… and the ledger PREFIX_dataset.json.", metavar="PREFIX", required=True
    )
    part: str | None = option(
        None,
        "Tokenise part I of N of the input alone, with I from 1 to N, for example in a job array; when all parts are "
        "there, pack_data.py --data-path PREFIX makes the data set that one process would have made.",
        metavar="I/N",
    )
    workers: int = option(1, "Processes that tokenise; the result does not depend on it.", at_least=1)
    cache_dir: str | None = option(
        None,
        "Keep encoded records here, by content, so that only new records cost time when a task is added or a file "
        "grows. The folder may be removed at any time. Without it, only a run that was killed can be continued.",
        metavar="DIR",
    )


@dataclasses.dataclass(frozen=True)
class DataSetOptions:
    """Stored samples are packed without tokenising. One data set: for one more length, or the same with other options;
    or its parts, made with --part, are merged. Several: merged into a new one. Packing options that are not given are
    those the first data set or its parts were made with."""

    data_path: tuple[str, ...] = option(None, "Data sets, by their --output-prefix.", metavar="PREFIX", required=True)
    output_prefix: str | None = option(
        None, "Where to write the merged data set; without it, a single data set is changed itself.", metavar="PREFIX"
    )


@dataclasses.dataclass(frozen=True)
class InspectOptions:
    """Shows a packed data set: its ledger, and samples with their supervised tokens marked."""

    samples: int = option(1, "Samples to show of each task.", at_least=0)
    packs: str | None = option(
        None,
        "Show these packs of the training split instead, e.g. 12,40, as the event 'bad step' of a run names them: the "
        "text of each sample slice and the file and line that it came from, as far as the ledger knows.",
        metavar="N,…",
    )
    seq_length: int | None = option(
        None, "With --packs: tokens of a pack, where the data set is packed for several lengths.", at_least=1
    )
    histograms: bool = option(False, "Show the lengths of the samples of each task.")
    check: bool = option(False, "Read everything again: hashes, counts and packs against the ledger.")


def _split_weights(text: str) -> tuple[float, float, float]:
    try:
        train, valid, test = (float(part) for part in text.split(","))
    except ValueError:
        train = valid = test = -1.0
    if min(train, valid, test) < 0 or not 0 < train + valid + test < float("inf"):
        raise InputError(f"--split {text}: give three weights that are not negative, e.g. 98,2,0")
    return train, valid, test


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
