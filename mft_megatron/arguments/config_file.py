"""Options from a file, YAML or JSON, instead of the command line.

::

    num_layers: 4                    a key is an option's name, with _ or -; its other names are accepted, too
    disable-bias-linear: true        and so are Megatron's flags
    learning_rate:                   options may stand in sections, the groups of --help
      lr: 1e-3

What a value is decides the option, not YAML: ``1e-3`` is a number, ``no`` a word. ``null`` is as if the option were not
given. A run's own ``config.yaml`` can be read again as it is: it is known by ``world_size``, which is no option.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mft_megatron.errors import InputError
from mft_megatron.options import info_of, spellings, value_count, value_type
from mft_megatron.suggestions import did_you_mean

# in a run's config.yaml: how many ranks it had
DESCRIPTION = "world_size"
TRUE_FALSE = {"true": True, "false": False}
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclasses.dataclass(frozen=True)
class _Scalar:
    """One value as it is written; ``quoted``: text, whatever it looks like."""

    text: str
    quoted: bool

    @property
    def is_null(self) -> bool:
        return not self.quoted and self.text.lower() in ("", "~", "null")


@dataclasses.dataclass(frozen=True)
class _Entry:
    """``value``: a scalar, a list of scalars, or a list of entries in ``section``."""

    key: str
    value: Any
    where: str
    section: bool = False


def read_config_file(
    path: str, groups: Sequence[tuple[str, type]], refused: Mapping[str, str]
) -> tuple[dict[str, Any], bool]:
    """What a file gives, by field name.

    Args:
        path: a ``.json`` file, or YAML.
        groups: ``(title, dataclass)`` pairs.
        refused: as for :func:`mft_megatron.options.build_parser`.

    Returns:
        the values, and whether they are the effective values of a whole run (a ``config.yaml``), of which most are
        there because they are there for every run.

    Raises:
        InputError: the file cannot be read, is empty or no mapping; a key is unknown or given twice; a value is of
            another kind than its option. Names the file, and of YAML the line.
    """
    fields = {field.name: field for _, group in groups for field in dataclasses.fields(group)}
    keys = {name: field for field in fields.values() for name in _names(field)}
    sections = {_plain(title): {field.name for field in dataclasses.fields(group)} for title, group in groups}
    given: dict[str, Any] = {}
    seen: dict[str, str] = {}
    effective = False
    for entry, section in _flat(_read(path), sections):
        key = _plain(entry.key)
        if key == DESCRIPTION and section is None:
            effective = True
            continue
        field = keys.get(key)
        option = "--" + key.replace("_", "-")
        if field is None and option in refused:
            raise InputError(f"{entry.where}: {entry.key}: {refused[option]}")
        if field is None:
            hint = did_you_mean(key, [*keys, *sections]) or "see --help for the list"
            raise InputError(f"{entry.where}: unknown option {entry.key}; {hint}")
        if section is not None and field.name not in sections[section]:
            own = next(name for name, members in sections.items() if field.name in members)
            raise InputError(f"{entry.where}: {entry.key} is no option of {section}; put it into {own}")
        if field.name in seen:
            raise InputError(
                f"{entry.where}: {entry.key} is given a second time, after {seen[field.name]}; leave one of them out"
            )
        seen[field.name] = entry.where
        value = _value(entry, field, key)
        if value is not None:
            given[field.name] = value
    return given, effective


def _plain(name: str) -> str:
    return name.strip().lstrip("-").replace("-", "_").replace(" ", "_")


def _names(field: dataclasses.Field) -> set[str]:
    return {field.name, *map(_plain, spellings(field))}


def _flat(entries: list[_Entry], sections: dict[str, set[str]]) -> Iterator[tuple[_Entry, str | None]]:
    """Every option with the section that it stands in."""
    for entry in entries:
        if not entry.section:
            if _plain(entry.key) in sections:
                raise InputError(f"{entry.where}: {entry.key} is a section; give options below it, or leave it out")
            yield entry, None
            continue
        name = _plain(entry.key)
        if name not in sections:
            hint = did_you_mean(name, sections) or f"sections are {', '.join(sections)}"
            raise InputError(f"{entry.where}: unknown section {entry.key}; {hint}")
        for inner in entry.value:
            if inner.section:
                raise InputError(f"{inner.where}: {inner.key} is a section within a section; there is one level only")
            yield inner, name


def _value(entry: _Entry, field: dataclasses.Field, key: str) -> Any:
    """The entry's value as the option's; ``None`` where it is not given."""
    kind, count = value_type(field), value_count(field)
    if isinstance(entry.value, _Scalar) and entry.value.is_null:
        return None
    if isinstance(entry.value, list) and kind not in KINDS:
        # an option that reads lists itself, as text
        return _scalar(entry, _Scalar(f"[{','.join(item.text for item in entry.value)}]", quoted=True), field)
    if isinstance(entry.value, list):
        if count is None:
            raise InputError(f"{entry.where}: {entry.key} is {_name(kind)}, not a list; give one value")
        values = tuple(_scalar(entry, item, field) for item in entry.value)
        if not values or (count and len(values) != count):
            raise InputError(f"{entry.where}: {entry.key} takes {count or 'at least 1'} value(s), not {len(values)}")
        return values
    value = _scalar(entry, entry.value, field)
    if kind is bool and key != field.name:
        # a flag, which is given by true: then the option has the opposite of its default
        return field.default != value
    if count:
        raise InputError(f"{entry.where}: {entry.key} takes a list of {count} values, not one")
    return value if count is None else (value,)


def _scalar(entry: _Entry, scalar: _Scalar, field: dataclasses.Field) -> Any:
    info, kind, text = info_of(field), value_type(field), scalar.text
    wrong = InputError(f"{entry.where}: {entry.key} is {text!r}; it must be {_name(kind)}")
    if kind is bool:
        if scalar.quoted or text.lower() not in TRUE_FALSE:
            raise wrong
        return TRUE_FALSE[text.lower()]
    if scalar.quoted and kind in (int, float):
        raise wrong
    try:
        value = kind(text)
    except (ValueError, TypeError):
        raise wrong from None
    except Exception as error:  # a reader of its own, that says what is wrong
        raise InputError(f"{entry.where}: {entry.key} is {text!r}: {error}") from None
    if info.choices and value not in (*info.choices, *info.values):
        raise InputError(f"{entry.where}: {entry.key} is {text!r}; choose from {', '.join(info.choices)}")
    return info.values.get(value, value) if isinstance(value, str) else value


def _name(kind: Any) -> str:
    return KINDS.get(kind) or kind.__name__


def _read(path: str) -> list[_Entry]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--yaml-cfg {path}: not a text in UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise InputError(f"--yaml-cfg {path}: cannot be read ({error.strerror})") from None
    return _read_json(path, text) if path.endswith(".json") else _read_yaml(path, text)


def _no_mapping(where: str, what: str) -> InputError:
    return InputError(f"{where}: {what}; write an option a line, as in 'num_layers: 4'")


def _read_yaml(path: str, text: str) -> list[_Entry]:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        raise InputError(f"{path}{line}: not YAML ({error.problem}); mend this line or the one before") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    if node is None:
        raise _no_mapping(path, "the file is empty")
    if not isinstance(node, yaml.MappingNode):
        raise _no_mapping(f"{path}:{node.start_mark.line + 1}", "no mapping of options to values")
    return [_yaml_entry(path, *pair) for pair in node.value]


def _yaml_entry(path: str, key: yaml.Node, value: yaml.Node) -> _Entry:
    where = f"{path}:{key.start_mark.line + 1}"
    if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
        raise _no_mapping(where, "a key that is no option's name")
    if isinstance(value, yaml.MappingNode):
        return _Entry(key.value, [_yaml_entry(path, *pair) for pair in value.value], where, section=True)
    if isinstance(value, yaml.SequenceNode):
        if not all(isinstance(item, yaml.ScalarNode) for item in value.value):
            raise InputError(f"{where}: {key.value} is a list of lists or mappings; give a list of values")
        return _Entry(key.value, [_Scalar(item.value, item.style is not None) for item in value.value], where)
    return _Entry(key.value, _Scalar(value.value, value.style is not None), where)


class _Pairs(list):
    """The members of a JSON object; a dict would forget those that are given twice."""


class _Plain(str):
    """A number, true or false of JSON, as it is written."""


def _read_json(path: str, text: str) -> list[_Entry]:
    if not text.strip():
        raise _no_mapping(path, "the file is empty")
    try:
        content = json.loads(
            text, object_pairs_hook=_Pairs, parse_int=_Plain, parse_float=_Plain, parse_constant=_Plain
        )
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(content, _Pairs):
        raise _no_mapping(path, "no mapping of options to values")
    return _json_entries(path, content)


def _json_entries(path: str, pairs: Iterable[tuple[str, Any]]) -> list[_Entry]:
    entries = []
    for key, value in pairs:
        if isinstance(value, _Pairs):
            entries.append(_Entry(key, _json_entries(path, value), path, section=True))
            continue
        values = value if isinstance(value, list) else [value]
        if any(isinstance(item, list) for item in values):
            raise InputError(f"{path}: {key} is a list of lists or mappings; give a list of values")
        scalars = [_json_scalar(item) for item in values]
        entries.append(_Entry(key, scalars if isinstance(value, list) else scalars[0], path))
    return entries


def _json_scalar(value: Any) -> _Scalar:
    if value is None or isinstance(value, bool):
        return _Scalar(json.dumps(value), quoted=False)
    return _Scalar(str(value), quoted=not isinstance(value, _Plain))
