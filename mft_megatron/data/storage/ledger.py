"""The ledger, ``P_dataset.json``: what went in, what came of it, and which files hold it.

It is written last. A data set whose files do not match their ledger is not read.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from mft_megatron.errors import InputError

FORMAT = "mft_megatron packed dataset"
PACK_ENDS = (".npy", "_offsets.npy", "_cuts.npy")  # of the files that belong to one length
FORMAT_VERSION = 2


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file that was read: path as given, bytes, lines, sha256 of its content."""

    path: str
    size: int
    lines: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class TaskEntry:
    """Samples of a task as they were tokenised: ``samples_in == kept + sum(dropped.values())``.

    ``tokens`` and ``supervised_tokens`` count those of kept samples; a supervised token is a target, so a sample's
    first token never is one. ``documents``: all samples are documents, in which every token is supervised.
    ``filled``: samples that were made fill-in-the-middle. ``encoding``: all that decides how records became samples.
    ``weight``, ``sampling``, ``overlong``: what the task file says for this task, ``None`` where it says nothing.
    """

    name: str
    samples_in: int
    kept: int
    dropped: dict[str, int]
    tokens: int
    supervised_tokens: int
    documents: bool
    filled: int
    encoding: dict[str, Any]
    weight: float | None
    sampling: float | None
    overlong: str | None
    sources: list[InputFile]


@dataclasses.dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer the ids belong to; ``model`` is where it lay, ``fingerprint`` is of its content."""

    type: str
    model: str
    fingerprint: str
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int
    pad_token_id: int


@dataclasses.dataclass(frozen=True)
class PackEntry:
    """One split packed for one length; ``fill`` is the share of positions that hold a token.

    ``samples`` counts what is in the packs: a window of a sample is one, and a sample that sampling repeats is several.
    """

    packs: int
    samples: int
    tokens: int
    supervised_tokens: int
    fill: float


@dataclasses.dataclass(frozen=True)
class TaskCut:
    """What became of a task's samples for one length: ``TaskEntry.kept == kept + sum(dropped.values())``.

    ``tokens`` and ``supervised_tokens`` are those of the kept samples after cutting, each sample counted once.
    ``truncated`` and ``windowed`` samples are among the kept; ``windows`` is how many windows the latter gave, and
    ``unsupervised_windows`` how many were left out, because they have nothing to learn. ``splits``: kept samples by
    split. ``uses``: training samples by how often one pass uses them.
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
    """The data set as packed for one length: the options it was packed with, each task's :class:`TaskCut` in the order
    of the tasks, and the splits that have samples."""

    options: dict[str, Any]
    tasks: list[TaskCut]
    packs: dict[str, PackEntry]

    @property
    def joined(self) -> bool:
        """Whether a row is one stream across the borders of samples."""
        return self.options["padding_mode"] == "concat"

    @property
    def padded(self) -> bool:
        """Whether a row is one sample."""
        return self.options["padding_mode"] == "padding"


@dataclasses.dataclass(frozen=True)
class ArrayEntry:
    """A file of the data set by the end of its name, e.g. ``_input_ids.bin``: bytes and sha256."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Ledger:
    """``lengths``: by sequence length, as text, the way JSON has it, in the order they were made. ``chat_template``: of
    tasks that name none."""

    tasks: list[TaskEntry]
    tokenizer: TokenizerEntry
    chat_template: dict[str, Any]
    lengths: dict[str, LengthEntry]
    arrays: dict[str, ArrayEntry]
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def arrays_for(self, seq_length: int) -> dict[str, ArrayEntry]:
        """The files that the data set consists of for one length, by the ends of their names."""
        others = tuple(f"_{length}{end}" for length in self.lengths for end in PACK_ENDS if length != str(seq_length))
        return {name: entry for name, entry in self.arrays.items() if not name.endswith(others)}

    def dataset_hash(self, seq_length: int) -> str:
        """Identity of the content for one length: sha256 over the format's version, the tasks' names and the arrays."""
        content = [self.format_version, [task.name for task in self.tasks]]
        content += sorted((name, entry.sha256) for name, entry in self.arrays_for(seq_length).items())
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"


def ledger_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}_dataset.json")


def read_ledger(prefix: str | Path) -> Ledger:
    """The ledger of the data set ``prefix``.

    Raises:
        InputError: there is none, or it is damaged or of another version.
    """
    path = ledger_path(prefix)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"--data-path {prefix}: no ledger {path.name} there; give the --output-prefix of tools/preprocess_data.py"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); preprocess the data again") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION or content.get("format") != FORMAT:
        raise InputError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}; preprocess again")
    try:
        return _from_dict(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: incomplete ledger ({error}); preprocess the data again") from None


def _from_dict(content: dict[str, Any]) -> Ledger:
    tasks = [
        TaskEntry(**{**task, "sources": [InputFile(**source) for source in task["sources"]]})
        for task in content["tasks"]
    ]
    lengths = {
        length: LengthEntry(
            options=entry["options"],
            tasks=[TaskCut(**task) for task in entry["tasks"]],
            packs={split: PackEntry(**packed) for split, packed in entry["packs"].items()},
        )
        for length, entry in content["lengths"].items()
    }
    arrays = {name: ArrayEntry(**entry) for name, entry in content["arrays"].items()}
    tokenizer = TokenizerEntry(**content["tokenizer"])
    _refuse_inconsistent(lengths, len(tasks))
    return Ledger(**{**content, "tasks": tasks, "lengths": lengths, "arrays": arrays, "tokenizer": tokenizer})


def _refuse_inconsistent(lengths: dict[str, LengthEntry], num_tasks: int) -> None:
    if not lengths or not all(length.isdecimal() for length in lengths):
        raise TypeError(f"lengths {', '.join(lengths) or 'missing'}")
    if any(len(entry.tasks) != num_tasks for entry in lengths.values()):
        raise TypeError("not as many tasks for a length as in all")


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
