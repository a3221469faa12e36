"""Tasks and the files they are made of: what ``--task NAME=PATH`` stands for; ``task_file.py`` reads YAML."""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

from mft_megatron.errors import InputError

from .reader import BATCH_BYTES, IDS, MASK, TaskReader, files_on_disk

__all__ = [
    "BATCH_BYTES",
    "SUFFIXES",
    "TaskFiles",
    "TaskReader",
    "check_task_name",
    "expand_path",
    "files_on_disk",
    "parse_tasks",
    "unite_files",
    "usable_files",
]

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".idx")
RESERVED_NAMES = ("macro", "objective")  # what --early-stopping-metric means by them


@dataclasses.dataclass(frozen=True)
class TaskFiles:
    """A task: its files in the order they are read, and what is set for it alone; ``None`` leaves it to the options.

    ``shape``: a key of ``RECORD_FORMATS`` or "auto". ``template``: as ``--chat-template``. ``weight``: of the
    task in training, at least 0. ``sampling``: how often an epoch holds each sample, above 0. ``overlong``: one of
    ``cutting.OVERLONG``. ``fim_rate``: 0 to 1.
    """

    name: str
    files: tuple[Path, ...]
    shape: str = "auto"
    template: str | None = None
    weight: float | None = None
    sampling: float | None = None
    overlong: str | None = None
    fim_rate: float | None = None


def parse_tasks(words: tuple[str, ...]) -> dict[str, TaskFiles]:
    """``NAME=PATH`` words as tasks, in the order their names come; the words of one name add up.

    Raises:
        InputError: a malformed word or name, what :func:`expand_path` refuses, a file that a task has twice.
    """
    files: dict[str, list[Path]] = {}
    for word in words:
        where = f"--task {word}"
        name, equals, text = word.partition("=")
        if not equals or not name or not text:
            raise InputError(f"{where}: give NAME=PATH")
        check_task_name(name, where)
        files[name] = unite_files(files.get(name, []), expand_path(Path(text), where), where)
    return {name: TaskFiles(name, tuple(paths)) for name, paths in files.items()}


def check_task_name(name: str, where: str) -> None:
    """Refuse a name that other options could not spell.

    Raises:
        InputError: empty, with a comma, an equals sign or a control character, with a space at an end, or reserved.
    """
    if not name or name != name.strip() or any(char in ",=" or not char.isprintable() for char in name):
        raise InputError(
            f"{where}: the task name {name!r} must not be empty, hold a comma, = or control character, or have a space "
            "at an end"
        )
    if name in RESERVED_NAMES:
        raise InputError(f"{where}: a task cannot be called {name}, which --early-stopping-metric reads otherwise")


def expand_path(path: Path, where: str) -> list[Path]:
    """The files that a path stands for: itself; of a folder all that can be read in it and below, sorted by path, but
    what is hidden; of the prefix of a tokenised data set its index.

    Raises:
        InputError: no such path, a file of an unknown kind, a folder with nothing to read.
    """
    if path.is_dir():
        return usable_files([path], where)
    if path.is_file():
        _check_kind(path, where)
        return [path]
    for end in (".idx", f"{IDS}.idx"):
        index = path.with_name(path.name + end) if path.name else path
        if index.is_file():
            return [index]
    raise InputError(f"{where}: no such file or folder: {path}")


def usable_files(paths: Iterable[Path], where: str) -> list[Path]:
    """Those of some files, and of the files in and below some folders, that can be read; the others are left out.

    Raises:
        InputError: none of them can be read.
    """
    files, others = [], []
    for path in paths:
        for file in _files_below(path) if path.is_dir() else [path]:
            (files if _is_source(file, found=True) else others).append(file)
    if not files:
        names = ", ".join(file.name for file in others[:5]) or "no file"
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise InputError(f"{where}: no {_known()} file there; there is {names}{more}")
    return files


def unite_files(before: Iterable[Path], more: Iterable[Path], where: str) -> list[Path]:
    """Both, in this order.

    Raises:
        InputError: a file comes twice, be it under another name.
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


def _is_source(file: Path, found: bool = False) -> bool:
    """``found``: in a folder or by a pattern, where a data set of our own is not meant; merging is another command."""
    if not file.name.endswith(SUFFIXES) or not file.is_file():
        return False
    if found and file.with_name(f"{file.name.removesuffix(f'{IDS}.idx')}_dataset.json").exists():
        return False
    # the masks are read with the tokens they belong to
    return not (file.name.endswith(f"{MASK}.idx") and _tokens_of(file).exists())


def _tokens_of(mask: Path) -> Path:
    return mask.with_name(mask.name.removesuffix(f"{MASK}.idx") + f"{IDS}.idx")


def _check_kind(path: Path, where: str) -> None:
    if path.name.endswith(SUFFIXES):
        if not _is_source(path):
            raise InputError(f"{where}: {path.name} holds the loss mask; give {_tokens_of(path).name}")
        return
    hint = ""
    if path.suffix == ".bin":
        hint = f"; give {path.with_suffix('.idx').name}, its index"
    elif ".json" in path.suffixes:
        hint = "; one JSON object a line is called .jsonl"
    raise InputError(f"{where}: {path.name} is of no known kind ({_known()}){hint}")


def _known() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
