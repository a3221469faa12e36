"""Options from a YAML or JSON file.

::

    num_layers: 4                    a key is an option's name, with _ or -; its aliases are accepted, too,
    disable-bias-linear: true        and Megatron's flags
    learning_rate:                   options may be in sections: the groups of --help
      lr: 1e-3

The option, not YAML, decides the type of a value: ``1e-3`` is a number, ``no`` is text. ``null`` means that the option
is not given. A run's ``config.yaml`` can be read unchanged; its key ``world_size``, which is no option, identifies it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mft_megatron.errors import InputError
from mft_megatron.options import Given, info_of, spellings, value_count, value_type
from mft_megatron.suggestions import did_you_mean

from .config_syntax import Entry, Scalar, Section, read_entries

if TYPE_CHECKING:
    from mft_megatron.options import Group

# Key of a run's config.yaml: the number of ranks.
WORLD_SIZE = "world_size"
TRUE_FALSE = {"true": True, "false": False}
KINDS: Mapping[Callable[[str], object], str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
}


def read_config_file(
    path: str, groups: Sequence[tuple[str, "Group"]], refused: Mapping[str, str]
) -> tuple[Given, bool]:
    """Read the options that a file gives, by field name.

    Args:
        path: a ``.json`` file, or YAML.
        groups: ``(title, dataclass)`` pairs.
        refused: as for :func:`mft_megatron.options.build_parser`.

    Returns:
        the values, and whether the file is a run's ``config.yaml``, which has a value for every option.

    Raises:
        InputError: the file cannot be read, is empty or no mapping; a key is unknown or given twice; a value has the
            wrong type. The message names the file, and the line if it is YAML.
    """
    fields = {field.name: field for _, group in groups for field in dataclasses.fields(group)}
    keys = {name: field for field in fields.values() for name in _names(field)}
    sections = {_plain(title): {field.name for field in dataclasses.fields(group)} for title, group in groups}
    given: Given = {}
    seen: dict[str, str] = {}
    is_config_of_run = False
    for entry, section in _flat(read_entries(path), sections):
        key = _plain(entry.key)
        if key == WORLD_SIZE and section is None:
            is_config_of_run = True
            continue
        field = keys.get(key)
        if field is None:
            raise InputError(f"{entry.where}: {_unknown(entry.key, key, [*keys, *sections], refused)}")
        if section is not None and field.name not in sections[section]:
            right = next(name for name, members in sections.items() if field.name in members)
            raise InputError(f"{entry.where}: {entry.key} is no option of {section}; put it into {right}")
        if field.name in seen:
            raise InputError(
                f"{entry.where}: {entry.key} is given a second time, after {seen[field.name]}; leave one of them out"
            )
        seen[field.name] = entry.where
        value = _value(entry, field, key)
        if value is not None:
            given[field.name] = value
    return given, is_config_of_run


def _plain(name: str) -> str:
    return name.strip().lstrip("-").replace("-", "_").replace(" ", "_")


def _names(field: dataclasses.Field[Any]) -> set[str]:
    return {field.name, *map(_plain, spellings(field))}


def _unknown(name: str, key: str, known: Iterable[str], refused: Mapping[str, str]) -> str:
    """The end of the line that refuses a key without an option."""
    option = "--" + key.replace("_", "-")
    if option in refused:
        return f"{name}: {refused[option]}"
    return f"unknown option {name}; {did_you_mean(key, known) or 'see --help for the list'}"


def _flat(entries: Iterable[Entry | Section], sections: Mapping[str, object]) -> Iterator[tuple[Entry, str | None]]:
    """Yield every option with the name of its section."""
    for entry in entries:
        name = _plain(entry.key)
        if isinstance(entry, Entry):
            if name in sections:
                raise InputError(f"{entry.where}: {entry.key} is a section; give options below it, or leave it out")
            yield entry, None
            continue
        if name not in sections:
            hint = did_you_mean(name, sections) or f"sections are {', '.join(sections)}"
            raise InputError(f"{entry.where}: unknown section {entry.key}; {hint}")
        for inner in entry.entries:
            if isinstance(inner, Section):
                raise InputError(f"{inner.where}: {inner.key} is a section within a section; there is one level only")
            yield inner, name


def _value(entry: Entry, field: dataclasses.Field[Any], key: str) -> object:
    """Convert an entry's value to the option's type; ``None`` if it is not given."""
    kind, count = value_type(field), value_count(field)
    if isinstance(entry.value, list):
        if kind not in KINDS:
            # The reader of this option parses lists itself.
            return _convert(entry, Scalar(f"[{','.join(item.text for item in entry.value)}]", quoted=True), field)
        if count is None:
            raise InputError(f"{entry.where}: {entry.key} is {_kind_name(kind)}, not a list; give one value")
        values = tuple(_convert(entry, item, field) for item in entry.value)
        if not values or (count and len(values) != count):
            raise InputError(f"{entry.where}: {entry.key} takes {count or 'at least 1'} value(s), not {len(values)}")
        return values
    if entry.value.is_null:
        return None
    value = _convert(entry, entry.value, field)
    if kind is bool and key != field.name:
        # The key is a flag: true gives the option the opposite of its default.
        return field.default != value
    if count:
        raise InputError(f"{entry.where}: {entry.key} takes a list of {count} values, not one")
    return value if count is None else (value,)


def _convert(entry: Entry, scalar: Scalar, field: dataclasses.Field[Any]) -> object:
    info, kind, text = info_of(field), value_type(field), scalar.text
    wrong = InputError(f"{entry.where}: {entry.key} is {text!r}; it must be {_kind_name(kind)}")
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
    except (InputError, RecursionError) as error:  # from the reader of the option
        raise InputError(f"{entry.where}: {entry.key} is {text!r}: {error}") from None
    if info.choices and value not in (*info.choices, *info.values):
        raise InputError(f"{entry.where}: {entry.key} is {text!r}; choose from {', '.join(info.choices)}")
    return info.values.get(value, value) if isinstance(value, str) else value


def _kind_name(kind: Callable[[str], object]) -> str:
    return KINDS[kind] if kind in KINDS else str(getattr(kind, "__name__", kind))
