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
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file that was read: path as given, bytes, lines, sha256 of its content."""

    path: str
    size: int
    lines: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class TaskEntry:
    """Samples of a task: ``samples_in == kept + sum(dropped.values())``; ``truncated`` ones are among the kept.

    ``tokens`` and ``supervised_tokens`` count those of kept samples; a supervised token is a target, so a sample's
    first token never is one. ``splits``: kept samples by split.
    """

    name: str
    samples_in: int
    kept: int
    truncated: int
    dropped: dict[str, int]
    tokens: int
    supervised_tokens: int
    splits: dict[str, int]
    sources: list[SourceFile]


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
    """One split packed for one length; ``fill`` is the share of positions that hold a token."""

    packs: int
    samples: int
    tokens: int
    supervised_tokens: int
    fill: float


@dataclasses.dataclass(frozen=True)
class ArrayEntry:
    """A file of the data set by the end of its name, e.g. ``_input_ids.bin``: bytes and sha256."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Ledger:
    """``packs``: by sequence length (as text, the way JSON has it), then by split."""

    tasks: list[TaskEntry]
    tokenizer: TokenizerEntry
    chat_template: dict[str, Any]
    split: dict[str, Any]
    overlong: str
    packs: dict[str, dict[str, PackEntry]]
    arrays: dict[str, ArrayEntry]
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    @property
    def dataset_hash(self) -> str:
        """Identity of the content: sha256 over the format's version, the tasks' names and all arrays."""
        content = [self.format_version, [task.name for task in self.tasks]]
        content += sorted((name, entry.sha256) for name, entry in self.arrays.items())
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
        TaskEntry(**{**task, "sources": [SourceFile(**source) for source in task["sources"]]})
        for task in content["tasks"]
    ]
    packs = {
        length: {split: PackEntry(**entry) for split, entry in splits.items()}
        for length, splits in content["packs"].items()
    }
    arrays = {name: ArrayEntry(**entry) for name, entry in content["arrays"].items()}
    tokenizer = TokenizerEntry(**content["tokenizer"])
    return Ledger(**{**content, "tasks": tasks, "packs": packs, "arrays": arrays, "tokenizer": tokenizer})


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
