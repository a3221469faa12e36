"""``--task-file tasks.yaml``: many tasks, each with its files and settings.

::

    code:                              # a mapping from names to settings, or a list of settings with `name`
      paths: [code/*.jsonl, more.parquet]
      weight: 2.0
    chat: chats/                       # short for path: chats/

Paths, and a template that is a file, are relative to the folder of the YAML file.
"""

import contextlib
import glob
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mft_megatron.data.records.record_formats import RECORD_FORMATS
from mft_megatron.data.storage.ledger import OVERLONG
from mft_megatron.errors import InputError
from mft_megatron.suggestions import did_you_mean

from .task_files import FoundFiles, TaskFiles, check_task_name, expand_path, unite_files, usable_files

if TYPE_CHECKING:
    import yaml


def read_task_file(path: str | Path) -> dict[str, TaskFiles]:
    """Read the tasks of a YAML file, in its order.

    Returns:
        tasks by name.

    Raises:
        InputError: the file cannot be read, or a setting is unknown, missing or wrong: ``tasks.yaml:LINE: task NAME:
            …``.
    """
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"--task-file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        tasks: dict[str, TaskFiles] = {}
        for name, name_node, settings in _tasks(loader, root, path):
            where = f"{_position(path, name_node)}: task {name}"
            check_task_name(name, _position(path, name_node))
            if name in tasks:
                raise InputError(f"{where}: is there twice; give all its files in one place")
            tasks[name] = _task(loader, name, settings, path, where)
        return tasks
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not YAML that can be read ({error.problem or error.context})") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: not YAML that can be read ({reason})") from None


def _tasks(
    loader: "yaml.SafeLoader", root: "yaml.Node | None", path: Path
) -> Iterator[tuple[str, "yaml.Node", "yaml.Node"]]:
    """Name, its node, for errors, and the node of the settings of each task."""
    import yaml

    if isinstance(root, yaml.MappingNode):
        for key, settings in root.value:
            yield _name(loader, key, path), key, settings
    elif isinstance(root, yaml.SequenceNode):
        for node in root.value:
            if not isinstance(node, yaml.MappingNode):
                raise InputError(f"{_position(path, node)}: a task in a list is a mapping of settings with its name")
            named = [value for key, value in node.value if key.value == "name"]
            if not named:
                raise InputError(f"{_position(path, node)}: a task without a name; add name: …")
            yield _name(loader, named[0], path), node, node
    if not isinstance(root, (yaml.MappingNode, yaml.SequenceNode)) or not root.value:
        raise InputError(f"{path}: holds no task; write a mapping from names of tasks to their settings")


def _name(loader: "yaml.SafeLoader", node: "yaml.Node", path: Path) -> str:
    name = loader.construct_object(node, deep=True)
    if not isinstance(name, str):
        shown = getattr(node, "value", "") if isinstance(getattr(node, "value", ""), str) else "…"
        raise InputError(f"{_position(path, node)}: a task's name is text; write it in quotes: '{shown[:40]}'")
    return name


def _task(loader: "yaml.SafeLoader", name: str, node: "yaml.Node", path: Path, where: str) -> TaskFiles:
    import yaml

    if not isinstance(node, yaml.MappingNode):
        found = _files(loader.construct_object(node, deep=True), path.parent, where)
        return TaskFiles(name, tuple(found.files), left_out=tuple(found.left_out))
    given: dict[str, tuple[Any, str]] = {}
    for key_node, value_node in _pairs(loader, node, where):
        key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "…"
        position = f"{_position(path, key_node)}: task {name}"
        if key not in _KEYS:
            hint = did_you_mean(key, _KEYS) or f"known: {', '.join(_KEYS)}"
            raise InputError(f"{position}: unknown setting {key[:40]!r}; {hint}")
        given[key] = loader.construct_object(value_node, deep=True), position
    if given.get("name", (name,))[0] != name:
        raise InputError(f"{given['name'][1]}: name says otherwise; leave it out")
    given.pop("name", None)
    paths = [given.pop(key) for key in ("path", "paths") if key in given]
    if len(paths) != 1:
        raise InputError(f"{where}: give path or paths" + (", not both" if paths else ""))
    found = _files(paths[0][0], path.parent, paths[0][1])
    settings: dict[str, Any] = {}
    for key, (value, position) in given.items():
        field, check = _SETTINGS[key]
        settings[field] = check(value, f"{position}: {key}", path.parent)
    return TaskFiles(name, tuple(found.files), left_out=tuple(found.left_out), **settings)


def _pairs(loader: "yaml.SafeLoader", node: "yaml.MappingNode", where: str) -> list[tuple["yaml.Node", "yaml.Node"]]:
    """Keys and values of a mapping with those that it merges (``<<``); its direct keys are unique and win."""
    direct = [key.value for key, _ in node.value if isinstance(key.value, str)]
    twice = [key for key in direct if direct.count(key) > 1]
    if twice:
        raise InputError(f"{where}: {twice[0]} is given twice")
    loader.flatten_mapping(node)
    return node.value


def _position(path: Path, node: "yaml.Node") -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _files(value: object, folder: Path, where: str) -> FoundFiles:
    """Find the files of a path, or of several paths, each of which may be a pattern."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise InputError(f"{where}: a path is text, paths are a list of texts with at least one")
    files: list[Path] = []
    left_out: list[Path] = []
    for text in texts:
        if "\0" in text:
            raise InputError(f"{where}: no such file or folder: {text!r}")
        text = os.path.expanduser(text)
        if glob.has_magic(text) and not (folder / text).exists():
            more = _matching(text, folder, where)
        else:
            more = expand_path(folder / text, where)
        files = unite_files(files, more.files, where)
        left_out += more.left_out
    return FoundFiles(files, left_out)


def _matching(pattern: str, folder: Path, where: str) -> FoundFiles:
    """Find the usable files among those that match a pattern, and below the folders that match."""
    matched = sorted(folder / match for match in glob.glob(pattern, root_dir=folder, recursive=True))
    if not matched:
        raise InputError(f"{where}: no file matches {pattern}")
    found = usable_files(matched, f"{where}: {pattern}")
    # ** gives a folder, and what is in it
    return FoundFiles(list(dict.fromkeys(found.files)), list(dict.fromkeys(found.left_out)))


# --------------------------------------------------------------------------------------------------------- the settings


def _record_format(value: object, where: str, folder: Path) -> str:
    return _choice(value, where, ("auto", *RECORD_FORMATS))


def _overlong(value: object, where: str, folder: Path) -> str:
    return _choice(value, where, OVERLONG)


def _choice(value: object, where: str, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        hint = did_you_mean(str(value), choices) or f"known: {', '.join(choices)}"
        raise InputError(f"{where}: unknown value {str(value)[:40]!r}; {hint}")
    return value


def _template(value: object, where: str, folder: Path) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{where} must be text: a template's name, or the path of a .jinja file")
    return str(folder / os.path.expanduser(value)) if value.endswith(".jinja") else value


def _number(value: object, where: str, ask: str, fits: Callable[[float], bool]) -> float:
    number = math.nan
    # YAML reads 1e-3 as text
    if isinstance(value, (int, float, str, bytes)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
    if not (math.isfinite(number) and fits(number)):
        raise InputError(f"{where} must be {ask}, not {str(value)[:40]!r}")
    return number


_SETTINGS: dict[str, tuple[str, Callable[[object, str, Path], str | float]]] = {
    "weight": ("weight", lambda value, where, _: _number(value, where, "a number, 0 or more", lambda x: x >= 0)),
    "format": ("record_format", _record_format),
    "template": ("template", _template),
    "sampling": ("sampling", lambda value, where, _: _number(value, where, "a number above 0", lambda x: x > 0)),
    "overlong": ("overlong", _overlong),
    "fim_rate": ("fim_rate", lambda value, where, _: _number(value, where, "from 0 to 1", lambda x: 0 <= x <= 1)),
}
_KEYS = ("name", "path", "paths", *_SETTINGS)
