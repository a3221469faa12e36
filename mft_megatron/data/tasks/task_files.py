"""Tasks and the files they are made of, as ``--task NAME=PATH`` gives them; ``task_file.py`` reads them from YAML."""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from mft_megatron.data.records.record_formats import is_record
from mft_megatron.data.storage.weights import TOKEN_WEIGHTS
from mft_megatron.errors import InputError
from mft_megatron.parsing.git_lfs import refuse_pointer

from .json_array import BOM, starts_with_array
from .tokenized_file import IDS, MASK, files_on_disk

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".parquet", ".idx")
_KNOWN = ".jsonl, .json (both also .gz or .zst), .parquet or .idx"
# bytes of a .json file by which it is told whether it begins with an array
_START = 1 << 16
# ends of the names of indices that belong to one of tokens, before .idx, and what they hold
_BESIDE_TOKENS = {MASK: "the loss mask", TOKEN_WEIGHTS: "weights"}
# metrics of --early-stopping-metric, which otherwise names a task
RESERVED_NAMES = ("macro", "objective")


@dataclasses.dataclass(frozen=True)
class TaskFiles:
    """A task: its files and its settings; a setting that is ``None`` is left to the options.

    Attributes:
        name: of the task.
        files: in the order they are read.
        record_format: a key of :data:`mft_megatron.data.records.record_formats.RECORD_FORMATS`, or "auto".
        template: as ``--chat-template``.
        weight: of the task in training, at least 0.
        sampling: epochs of the task in one pass, above 0.
        overlong: a value of :data:`mft_megatron.data.storage.ledger.OVERLONG`.
        fim_rate: fraction of documents to be written as fill-in-the-middle, 0 to 1.
        left_out: files of its folders that are not read.
    """

    name: str
    files: tuple[Path, ...]
    record_format: str = "auto"
    template: str | None = None
    weight: float | None = None
    sampling: float | None = None
    overlong: str | None = None
    fim_rate: float | None = None
    left_out: tuple[Path, ...] = ()


@dataclasses.dataclass(frozen=True)
class FoundFiles:
    """The files that a path stands for.

    Attributes:
        files: that can be read.
        left_out: beside them.
    """

    files: list[Path]
    left_out: list[Path] = dataclasses.field(default_factory=list)


def parse_tasks(words: tuple[str, ...]) -> dict[str, TaskFiles]:
    """Parse ``NAME=PATH`` words.

    Returns:
        tasks by name, in the order of the names; a name that is given several times has the files of all its words.

    Raises:
        InputError: a word or name is malformed, :func:`expand_path` refuses a path, or a task has a file twice.
    """
    files: dict[str, list[Path]] = {}
    left_out: dict[str, list[Path]] = {}
    for word in words:
        where = f"--task {word}"
        name, equals, text = word.partition("=")
        if not equals or not name or not text:
            raise InputError(f"{where}: give NAME=PATH")
        check_task_name(name, where)
        found = expand_path(Path(text), where)
        files[name] = unite_files(files.get(name, []), found.files, where)
        left_out[name] = left_out.get(name, []) + found.left_out
    return {name: TaskFiles(name, tuple(paths), left_out=tuple(left_out[name])) for name, paths in files.items()}


def check_task_name(name: str, where: str) -> None:
    """Refuse a name that other options could not give.

    Args:
        name: of a task.
        where: where it is given, for the message.

    Raises:
        InputError: the name is empty or reserved, has a comma, an equals sign or a control character, or a space at an
            end.
    """
    if not name or name != name.strip() or any(char in ",=" or not char.isprintable() for char in name):
        raise InputError(
            f"{where}: the task name {name!r} must not be empty, hold a comma, = or control character, or have a space "
            "at an end"
        )
    if name in RESERVED_NAMES:
        raise InputError(f"{where}: a task cannot be called {name}, which --early-stopping-metric reads otherwise")


def expand_path(path: Path, where: str) -> FoundFiles:
    """Find the files that a path stands for.

    These are the path itself; for a folder all readable files in it and below, sorted by path, without hidden ones; for
    the prefix of a tokenised data set its index.

    Args:
        path: as the user gave it.
        where: where it is given, for the message.

    Raises:
        InputError: there is no such path, the kind of the file is unknown, or the folder has no readable file.
    """
    try:
        is_folder = path.is_dir()
    except OSError as error:  # a name that is too long, for example
        raise InputError(f"{where}: {str(path)[:80]}…: {error.strerror}") from None
    if is_folder:
        return usable_files([path], where)
    if path.is_file():
        _check_kind(path, where)
        return FoundFiles([path])
    for end in (".idx", f"{IDS}.idx"):
        index = path.with_name(path.name + end) if path.name else path
        if index.is_file():
            return FoundFiles([index])
    raise InputError(f"{where}: no such file or folder: {path}")


def usable_files(paths: Iterable[Path], where: str) -> FoundFiles:
    """Find the readable files among some files and in and below some folders.

    A ``.json`` file is readable there if it begins with an array or with a record on a line; metadata of data sets have
    this ending, too. Files that belong to a readable index are not left out.

    Args:
        paths: files and folders.
        where: where they are given, for the message.

    Raises:
        InputError: none of them can be read, or a ``.json`` file is a pointer of Git LFS.
    """
    files: list[Path] = []
    others: list[Path] = []
    for path in paths:
        for file in _files_below(path) if path.is_dir() else [path]:
            (files if _is_readable(file, searched=True) else others).append(file)
    if not files:
        raise InputError(f"{where}: no {_KNOWN} file there; there is {_listed(others) or 'no file'}")
    used = {part for file in files if file.suffix == ".idx" for part in files_on_disk(file)}
    return FoundFiles(files, [file for file in others if file not in used])


def left_out_lines(tasks: Iterable[TaskFiles]) -> list[str]:
    """Write one line for each task whose folders have files that are not read."""
    return [
        f"task {task.name}: {len(task.left_out):,} {'file' if len(task.left_out) == 1 else 'files'} in its folders not "
        f"read: {_listed(task.left_out)}"
        for task in tasks
        if task.left_out
    ]


def _listed(files: Sequence[Path]) -> str:
    more = f" and {len(files) - 5:,} more" if len(files) > 5 else ""
    return ", ".join(file.name for file in files[:5]) + more


def unite_files(before: Iterable[Path], more: Iterable[Path], where: str) -> list[Path]:
    """Append files to the files of a task.

    Args:
        before: files that the task has.
        more: files to append.
        where: where these are given, for the message.

    Raises:
        InputError: a file occurs twice, possibly under another name.
    """
    files = list(before)
    known = {os.path.realpath(file): file for file in files}
    for file in more:
        real = os.path.realpath(file)
        if real in known:
            same = "" if known[real] == file else f", which is {known[real]}"
            raise InputError(f"{where}: the task already has the file {file}{same}; name it once")
        known[real] = file
        files.append(file)
    return files


def _files_below(folder: Path) -> list[Path]:
    files, visited = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        # a link may lead back up
        folders[:] = [] if real in visited else [name for name in folders if not name.startswith(".")]
        if real not in visited:
            files += [Path(root, name) for name in names if not name.startswith(".")]
        visited.add(real)
    return sorted(files)


def _is_readable(file: Path, searched: bool = False) -> bool:
    """Whether a file can be read as input of a task.

    ``searched``: the file comes from a folder or a pattern, where packed data sets are left out; another command merges
    them.
    """
    if not _has_known_ending(file) or not file.is_file():
        return False
    if searched and file.with_name(f"{file.name.removesuffix(f'{IDS}.idx')}_dataset.json").exists():
        return False
    if searched and file.suffix.lower() == ".json" and not _holds_records(file):
        return False
    # masks are read with the tokens that they belong to
    tokens = _tokens_of(file)
    return tokens is None or not tokens[0].exists()


def _has_known_ending(file: Path) -> bool:
    """Whether a file has one of :data:`SUFFIXES`, also in capitals except that of an index, which has a second file."""
    return file.name.endswith(SUFFIXES) or (file.name.lower().endswith(SUFFIXES) and file.suffix.lower() != ".idx")


def _holds_records(file: Path) -> bool:
    """Whether a ``.json`` file begins with an array, or with a line that is a record; refuses a pointer of Git LFS."""
    try:
        refuse_pointer(file)
        with open(file, "rb") as opened:
            start = opened.read(_START)
            if starts_with_array(iter([start]))[0]:
                return True
            lines = start.removeprefix(BOM).lstrip()
            record = json.loads(lines.partition(b"\n")[0] if b"\n" in lines else lines + opened.readline())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and is_record(record)


def _tokens_of(file: Path) -> tuple[Path, str] | None:
    """Index of the tokens that the masks or weights of an index belong to, and what it holds; ``None`` for others."""
    for end, what in _BESIDE_TOKENS.items():
        if file.name.endswith(f"{end}.idx"):
            return file.with_name(file.name.removesuffix(f"{end}.idx") + f"{IDS}.idx"), what
    return None


def _check_kind(path: Path, where: str) -> None:
    if _has_known_ending(path):
        tokens = _tokens_of(path)
        if tokens is not None and tokens[0].exists():
            raise InputError(f"{where}: {path.name} holds {tokens[1]}; give {tokens[0].name}")
        return
    hint = ""
    if path.suffix == ".bin":
        hint = f"; give {path.with_suffix('.idx').name}, its index"
    elif ".json" in path.suffixes:
        hint = "; name a plain file .json or .jsonl"
    raise InputError(f"{where}: {path.name} is of no known kind ({_KNOWN}){hint}")
