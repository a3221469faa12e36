"""The ledger of a data set ``P``, the file ``P_dataset.json``: its inputs, counts, packs and files.

It is written last. A data set whose files do not match their ledger is not read. The names of the fields below are the
keys of the file.
"""

import dataclasses
import glob
import hashlib
import json
from pathlib import Path
from typing import Any

from mft_megatron.errors import InputError
from mft_megatron.parsing.typed_json import from_json, parse_json

FORMAT = "mft_megatron packed dataset"
PACK_SUFFIXES = (".npy", "_offsets.npy", "_cuts.npy")  # of the files that belong to one length
FORMAT_VERSION = 4
READABLE_VERSIONS = (2, 3, 4)  # version 2 has no notes; 4 may have weights, and packs in another order
ARRAYS_VERSION = 2  # of the arrays alone; the hash of a data set, and with it the order of the data, depends on it

# of the order in which an epoch uses packs: 1 any order, 2 one that mixes tasks (mft_megatron.data.loading.epoch_order)
ORDER_VERSION = 2

# what becomes of samples that are longer than a pack: values of ``--overlong`` and of a task's ``overlong``
OVERLONG = ("drop", "truncate", "truncate-left", "split")

# values of a JSON object, decoded; each reader knows the types of its keys
JsonObject = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file that samples were read from.

    Attributes:
        path: as the user wrote it.
        size: bytes.
        lines: number of lines.
        sha256: of its content.
    """

    path: str
    size: int
    lines: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class TaskEntry:
    """Samples of a task as they were tokenised; ``samples_in + added == kept + sum(dropped.values())``.

    Attributes:
        name: of the task.
        samples_in: records that were read.
        kept: samples that are stored.
        dropped: records left out, by reason; of a record that was split, each sample counts.
        tokens: of kept samples.
        supervised_tokens: targets of kept samples; the first token of a sample is no target.
        documents: all samples are documents, in which every token is supervised.
        filled: samples that were written as fill-in-the-middle.
        encoding: everything that decides how records become samples.
        weight, sampling, overlong: settings of the task file for this task; ``None`` if it has none.
        sources: files that were read.
        unread_keys: records with a key that nothing reads, by the key's path.
        noted: counts of what else the user should know about the records, by kind.
        chats: samples that were written with the chat format; ``None`` in version 2, where it is not known.
        examples: prompts of some of the first samples; :mod:`mft_megatron.data.chat_templates.examples`.
        added: samples beyond one a record, which splitting rounds made.
        weights: where some are not 1, of ``samples`` and ``tokens``: how many have another (``others``), ``min``,
            ``max``, and ``sum``, which is of the samples' weights and of sample's times turn's weight over targets.
    """

    name: str
    samples_in: int
    kept: int
    dropped: dict[str, int]
    tokens: int
    supervised_tokens: int
    documents: bool
    filled: int
    encoding: JsonObject
    weight: float | None
    sampling: float | None
    overlong: str | None
    sources: list[InputFile]
    unread_keys: dict[str, int] = dataclasses.field(default_factory=dict)
    noted: dict[str, int] = dataclasses.field(default_factory=dict)
    chats: int | None = None
    examples: list[JsonObject] = dataclasses.field(default_factory=list)
    added: int = 0
    weights: JsonObject = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer that the ids belong to; fields are explained at :mod:`mft_megatron.data.tokenizers.tokenizer`.

    Attributes:
        model: path of the tokenizer when the data set was made.
        fingerprint: sha256 of its content.
        beginning_key: text of everything else that decides how texts begin; ``None`` where it is not known.
    """

    type: str
    model: str
    fingerprint: str
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int
    pad_token_id: int
    beginning_key: str | None = None

    @property
    def encoding_key(self) -> str:
        """Text of everything that decides the ids of samples, as of the tokenizer itself."""
        return f"{self.fingerprint}/{self.beginning_key}"


@dataclasses.dataclass(frozen=True)
class PackEntry:
    """Counts of one split packed for one length.

    Attributes:
        packs: rows.
        samples: sample slices in the packs: each window of a sample counts, and each repetition by sampling.
        tokens: in all packs, without padding.
        supervised_tokens: targets in all packs.
        fill: fraction of positions that hold a token.
    """

    packs: int
    samples: int
    tokens: int
    supervised_tokens: int
    fill: float


@dataclasses.dataclass(frozen=True)
class TaskCut:
    """Counts of a task's samples cut for one length; ``TaskEntry.kept == kept + sum(dropped.values())``.

    Attributes:
        kept: samples in the packs, including truncated and windowed ones.
        tokens, supervised_tokens: of kept samples after cutting; each sample counts once.
        truncated: kept samples that were cut at one end.
        windowed: kept samples that were cut into windows.
        windows: windows of these samples in the packs.
        unsupervised_windows: windows left out because they have no supervised target.
        dropped: samples left out, by reason.
        splits: kept samples, by split.
        uses: training samples, by the number of times that one pass uses them.
    """

    kept: int
    tokens: int
    supervised_tokens: int
    truncated: int
    windowed: int
    windows: int
    unsupervised_windows: int
    dropped: dict[str, int]
    splits: dict[str, int]
    uses: dict[str, int]


@dataclasses.dataclass(frozen=True)
class LengthEntry:
    """The data set packed for one length.

    Attributes:
        options: that it was packed with.
        tasks: counts of each task, in the order of the ledger's tasks.
        packs: counts of the splits that have samples.
        order_version: version of the order of packs in which new runs train; 1 where a data set does not say.
    """

    options: JsonObject
    tasks: list[TaskCut]
    packs: dict[str, PackEntry]
    order_version: int = 1

    @property
    def joined(self) -> bool:
        """Whether a row is one stream of concatenated documents, which attend across their borders."""
        return self.options["padding_mode"] == "concat"

    @property
    def padded(self) -> bool:
        """Whether a row holds one sample and padding."""
        return self.options["padding_mode"] == "padding"

    @property
    def packer(self) -> str:
        """How samples share training rows; data sets that do not say it were made before there was a choice."""
        return self.options.get("packer", "decreasing")


@dataclasses.dataclass(frozen=True)
class ArrayEntry:
    """A file of the data set.

    Attributes:
        size: bytes.
        sha256: of its content.
    """

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Everything that is known about a data set.

    Attributes:
        tasks: in the order of their samples.
        tokenizer: that the ids belong to.
        chat_template: description of the chat format of tasks that name none.
        lengths: by sequence length, which is text as in JSON, in the order in which they were packed.
        arrays: files by suffix, for example ``_input_ids.bin``.
        format, format_version: constants that identify the file.
    """

    tasks: list[TaskEntry]
    tokenizer: TokenizerEntry
    chat_template: JsonObject
    lengths: dict[str, LengthEntry]
    arrays: dict[str, ArrayEntry]
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def arrays_for(self, seq_length: int) -> dict[str, ArrayEntry]:
        """Files of the data set that one length needs, by suffix."""
        others = tuple(
            f"_{length}{end}" for length in self.lengths if length != str(seq_length) for end in PACK_SUFFIXES
        )
        return {suffix: entry for suffix, entry in self.arrays.items() if not suffix.endswith(others)}

    def dataset_hash(self, seq_length: int) -> str:
        """Identify the content for one length: sha256 over version, names of tasks and arrays."""
        arrays = sorted((suffix, entry.sha256) for suffix, entry in self.arrays_for(seq_length).items())
        content = [ARRAYS_VERSION, [task.name for task in self.tasks], *arrays]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def to_json(self) -> str:
        """Write the ledger as the text of its file."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"


def ledger_path(prefix: str | Path) -> Path:
    """Path of the ledger of the data set ``prefix``."""
    return Path(f"{prefix}_dataset.json")


def read_ledger(prefix: str | Path, option: str = "--data-path ") -> Ledger:
    """Read the ledger of the data set ``prefix``.

    Args:
        prefix: of the data set.
        option: that names it, with a space, for messages; empty where it is an argument without a name.

    Raises:
        InputError: it is missing, damaged or of another version.
    """
    path = ledger_path(prefix)
    try:
        content = parse_json(path)
    except FileNotFoundError:
        if next(path.parent.glob(f"{glob.escape(Path(prefix).name)}.part-*-of-*_part.json"), None) is not None:
            raise InputError(
                f"{option}{prefix}: there are only parts of the data set; merge them with tools/pack_data.py "
                f"--data-path {prefix}"
            ) from None
        raise InputError(
            f"{option}{prefix}: no ledger {path.name} there; give the --output-prefix of tools/preprocess_data.py"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); preprocess the data again") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version not in READABLE_VERSIONS or content.get("format") != FORMAT:
        known = ", ".join(map(str, READABLE_VERSIONS))
        raise InputError(f"{path}: format version {version}, this program reads {known}; preprocess again")
    try:
        ledger = from_json(Ledger, content)
        _refuse_inconsistent(ledger)
    except ValueError as error:
        raise InputError(f"{path}: damaged ledger ({error}); preprocess the data again") from None
    return ledger


def _refuse_inconsistent(ledger: Ledger) -> None:
    """Check what the types of a ledger do not say.

    Raises:
        ValueError: lengths are missing or are no numbers, a length has other tasks, or a file is outside the data set.
    """
    if not ledger.lengths or not all(length.isdecimal() and len(length) < 10 for length in ledger.lengths):
        raise ValueError(f"lengths {', '.join(ledger.lengths) or 'missing'}")
    if any(len(entry.tasks) != len(ledger.tasks) for entry in ledger.lengths.values()):
        raise ValueError("a length and the data set differ in their number of tasks")
    if other := next((task for task in ledger.tasks if task.overlong not in (None, *OVERLONG)), None):
        raise ValueError(f"task {other.name}: overlong {other.overlong!r}")
    for length, entry in ledger.lengths.items():
        if "padding_mode" not in entry.options or str(entry.options.get("seq_length")) != length:
            raise ValueError(f"the options of length {length} are not of that length")
    if outside := next((suffix for suffix in ledger.arrays if "/" in suffix), None):
        raise ValueError(f"{outside!r} is no file of the data set")


def file_sha256(path: str | Path) -> str:
    """Compute the sha256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
