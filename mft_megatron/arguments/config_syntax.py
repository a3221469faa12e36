"""A YAML or JSON file as entries: keys, and values spelled as in the file, with the line of each for messages."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from mft_megatron.errors import InputError


@dataclasses.dataclass(frozen=True)
class Scalar:
    """One value as the file spells it; a quoted one is text, whatever it looks like."""

    text: str
    quoted: bool

    @property
    def is_null(self) -> bool:
        """Whether the file says that there is no value."""
        return not self.quoted and self.text.lower() in ("", "~", "null")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A key with one value, or a list of values.

    Attributes:
        where: file and line, for messages.
    """

    key: str
    value: Scalar | list[Scalar]
    where: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A key with entries below it."""

    key: str
    entries: "list[Entry | Section]"
    where: str


def read_entries(path: str) -> list[Entry | Section]:
    """Read a file, as JSON if its name ends with ``.json``, else as YAML.

    Raises:
        InputError: the file cannot be read, is malformed, empty or no mapping, or has a list in a list.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--yaml-cfg {path}: not a text in UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise InputError(f"--yaml-cfg {path}: cannot be read ({error.strerror})") from None
    return _read_json(path, text) if path.endswith(".json") else _read_yaml(path, text)


def _no_mapping(where: str, what: str) -> InputError:
    return InputError(f"{where}: {what}; write one option per line, as in 'num_layers: 4'")


def _nested_list(where: str, key: str) -> InputError:
    return InputError(f"{where}: {key} is a list of lists or mappings; give a list of values")


def _read_yaml(path: str, text: str) -> list[Entry | Section]:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        raise InputError(f"{path}{line}: not YAML ({error.problem}); correct this line or the one before") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    if node is None:
        raise _no_mapping(path, "the file is empty")
    if not isinstance(node, yaml.MappingNode):
        raise _no_mapping(f"{path}:{node.start_mark.line + 1}", "no mapping of options to values")
    return [_yaml_entry(path, key, value) for key, value in node.value]


def _yaml_entry(path: str, key: yaml.Node, value: yaml.Node) -> Entry | Section:
    where = f"{path}:{key.start_mark.line + 1}"
    if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
        raise _no_mapping(where, "a key that is no option's name")
    if isinstance(value, yaml.MappingNode):
        return Section(key.value, [_yaml_entry(path, *pair) for pair in value.value], where)
    if isinstance(value, yaml.SequenceNode):
        scalars = [Scalar(item.value, item.style is not None) for item in value.value if _is_scalar(item)]
        if len(scalars) < len(value.value):
            raise _nested_list(where, key.value)
        return Entry(key.value, scalars, where)
    # yaml.Node has no other subclasses.
    return Entry(key.value, Scalar(value.value, getattr(value, "style", None) is not None), where)


def _is_scalar(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode)


class _Pairs(list[tuple[str, object]]):
    """The members of a JSON object; a dict would drop keys that are given twice."""


class _Bare(str):
    """A number of JSON, as the file spells it."""


def _read_json(path: str, text: str) -> list[Entry | Section]:
    if not text.strip():
        raise _no_mapping(path, "the file is empty")
    try:
        content = json.loads(text, object_pairs_hook=_Pairs, parse_int=_Bare, parse_float=_Bare, parse_constant=_Bare)
    except RecursionError:
        raise InputError(f"--yaml-cfg {path}: nested too deeply; options are in sections at most") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(content, _Pairs):
        raise _no_mapping(path, "no mapping of options to values")
    return _json_entries(path, content)


def _json_entries(path: str, pairs: Sequence[tuple[str, object]]) -> list[Entry | Section]:
    entries: list[Entry | Section] = []
    for key, value in pairs:
        if isinstance(value, _Pairs):
            entries.append(Section(key, _json_entries(path, value), path))
        elif not isinstance(value, list):
            entries.append(Entry(key, _json_scalar(value), path))
        elif any(isinstance(item, list) for item in value):
            raise _nested_list(path, key)
        else:
            entries.append(Entry(key, [_json_scalar(item) for item in value], path))
    return entries


def _json_scalar(value: object) -> Scalar:
    if value is None or isinstance(value, bool):
        return Scalar(json.dumps(value), quoted=False)
    return Scalar(str(value), quoted=not isinstance(value, _Bare))
