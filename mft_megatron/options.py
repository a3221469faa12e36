"""Dataclass fields as command-line options, and a command line as dataclasses.

A group of options is a frozen dataclass whose fields are made by :func:`option`. The field's name is the option's
name, its annotation says what values it takes, and its help is beside its default. :func:`parse` returns only what the
command line gives; :func:`fill` adds the defaults later, so that an architecture read from a checkpoint can come
between the two.
"""

import argparse
import dataclasses
import math
import operator
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar

from mft_megatron.errors import InputError
from mft_megatron.suggestions import did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Group: TypeAlias = type[DataclassInstance]
    G = TypeVar("G", bound=DataclassInstance)
else:
    G = TypeVar("G")

# The value of an option as a command line or a file gives it: its type is that of the field of the same name.
Given: TypeAlias = dict[str, Any]
_BOUNDS: Mapping[str, Callable[[float, float], bool]] = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}


@dataclasses.dataclass(frozen=True)
class OptionInfo:
    """The description of an option, besides the name, annotation and default of its field; see :func:`option`."""

    text: str
    reader: Callable[[str], object] | None
    choices: Sequence[str]
    flag: str | None
    aliases: Sequence[str]
    values: Mapping[str, str]
    repeated: bool
    metavar: str | tuple[str, ...] | None
    required: bool | str
    derived: bool
    bounds: Mapping[str, float]


def option(
    default: object,
    text: str,
    *,
    reader: Callable[[str], object] | None = None,
    choices: Sequence[str] = (),
    flag: str | None = None,
    aliases: Sequence[str] = (),
    values: Mapping[str, str] | None = None,
    repeated: bool = False,
    metavar: str | tuple[str, ...] | None = None,
    required: bool | str = False,
    derived: bool = False,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:  # a dataclass field, which mypy must accept as a value of any annotation
    """Declare one option as a dataclass field.

    The annotation ``int``, ``float``, ``str`` or ``bool`` is the type of its value, ``tuple[X, ...]`` means one or more
    values and ``tuple[X, X]`` exactly two. With ``| None`` the option may be left out for good; without it a default of
    ``None`` must be replaced before anyone uses the group, see ``required`` and ``derived``.

    Args:
        default: value if the option is not given; ``None`` means "not given".
        text: the help, without the default, which is appended.
        reader: function from a word to the value, for values with a grammar of their own; raises ``ValueError``.
        choices: the values allowed.
        flag: spelling of the option if it is not the field's name, e.g. ``--disable-bias-linear``; a boolean field
            whose flag is given takes the opposite of its default.
        aliases: other spellings, accepted and listed in the help.
        values: other spellings of the values, e.g. ``case3`` for ``task-token``.
        repeated: an option with several values may be given several times, and its values accumulate.
        metavar: name of the value in the help.
        required: a command line without the option is refused; a text says how to give it.
        derived: if the option is not given, its value follows from other options.
        at_least, above, at_most, below: bounds of a number, checked by the command, not by the parser.
    """
    bounds = zip(_BOUNDS, (at_least, above, at_most, below), strict=True)
    info = OptionInfo(
        text=text,
        reader=reader,
        choices=tuple(choices),
        flag=flag,
        aliases=tuple(aliases),
        values=dict(values or {}),
        repeated=repeated,
        metavar=metavar,
        required=required,
        derived=derived,
        bounds={name: bound for name, bound in bounds if bound is not None},
    )
    return dataclasses.field(default=default, metadata={"option": info})


def info_of(field: dataclasses.Field[Any]) -> OptionInfo:
    """The description that :func:`option` gave a field."""
    info: OptionInfo = field.metadata["option"]
    return info


def spelling(field: dataclasses.Field[Any]) -> str:
    """The field's option as a user types it."""
    return info_of(field).flag or "--" + field.name.replace("_", "-")


def spellings(field: dataclasses.Field[Any]) -> list[str]:
    """All spellings of the field's option, :func:`spelling` first."""
    return [spelling(field), *info_of(field).aliases]


def value_type(field: dataclasses.Field[Any]) -> Callable[[str], object]:
    """Type of a single value of the option: its reader, or ``int``, ``float``, ``str`` or ``bool`` by annotation."""
    reader = info_of(field).reader
    if reader is not None:
        return reader
    kind = _annotation(field)
    kind = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
    if not isinstance(kind, type):
        raise TypeError(f"{field.name}: {kind} needs a reader")
    return kind


def value_count(field: dataclasses.Field[Any]) -> int | None:
    """How many values the option takes: 0 for one or more, ``None`` for a single value that is no tuple."""
    kind = _annotation(field)
    if typing.get_origin(kind) is not tuple:
        return None
    items = typing.get_args(kind)
    return 0 if items[-1] is Ellipsis else len(items)


def _annotation(field: dataclasses.Field[Any]) -> object:
    """The field's annotation without ``| None``."""
    kinds = [kind for kind in typing.get_args(field.type) if kind is not types.NoneType]
    return kinds[0] if isinstance(field.type, types.UnionType) and len(kinds) == 1 else field.type


class _OneLineParser(argparse.ArgumentParser):
    """An argument parser that raises :class:`InputError` and suggests the spelling that was probably meant.

    Attributes:
        refused: options of another program, and the sentence that refuses each.
    """

    refused: Mapping[str, str] = types.MappingProxyType({})

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")

    def refuse_unknown(self, unknown: Sequence[str]) -> None:
        for word in unknown:
            name = word.split("=")[0].replace("_", "-")
            if name in self.refused:
                raise InputError(f"{name}: {self.refused[name]}")
        known = [name for action in self._actions for name in action.option_strings]
        for word in unknown:
            if not word.startswith("-"):
                raise InputError(f"unexpected argument {word!r}; see --help")
            name = word.split("=")[0]
            hint = did_you_mean(name.replace("_", "-"), known) or "see --help for the list"
            raise InputError(f"unknown option {name}; {hint}")


def build_parser(
    groups: Iterable[tuple[str, "Group"]], refused: Mapping[str, str] | None = None, **parser_options: Any
) -> _OneLineParser:
    """Make one parser for several groups; options that are not given leave no trace in its namespace.

    Args:
        groups: ``(title, dataclass)`` pairs.
        refused: options of another program that users may try, and the sentence that refuses each.
        parser_options: further arguments of :class:`argparse.ArgumentParser`.
    """
    parser = _OneLineParser(allow_abbrev=False, argument_default=argparse.SUPPRESS, **parser_options)
    parser.refused = refused or {}
    for title, group in groups:
        section = parser.add_argument_group(title, (group.__doc__ or "").strip())
        for field in dataclasses.fields(group):
            _add(section, field)
    return parser


def _add(section: argparse._ArgumentGroup, field: dataclasses.Field[Any]) -> None:
    info = info_of(field)
    text = info.text
    if info.aliases:
        text += f" Also accepted: {', '.join(info.aliases)}."
    if info.values:
        text += " Values also accepted: " + ", ".join(f"{k} = {v}" for k, v in info.values.items()) + "."
    if value_type(field) is bool:
        section.add_argument(
            *spellings(field), dest=field.name, action="store_const", const=not field.default, help=text
        )
        return
    if field.default is not None:
        text += f" (default: {field.default})"
    arguments: dict[str, Any] = {"dest": field.name, "type": value_type(field), "help": text.replace("%", "%%")}
    if info.choices:
        arguments["choices"] = [*info.choices, *info.values]
        arguments["metavar"] = "{" + ",".join(info.choices) + "}"
    if info.metavar:
        arguments["metavar"] = info.metavar
    count = value_count(field)
    if count is not None:
        arguments["nargs"] = count or "+"
        if info.repeated:
            arguments["action"] = "extend"
    section.add_argument(*spellings(field), **arguments)


def parse(parser: _OneLineParser, command_line: Sequence[str], groups: Iterable[tuple[str, "Group"]]) -> Given:
    """Read what the command line gives, by field name; options that it does not give are absent.

    Raises:
        InputError: an unknown option (with the nearest known one), a missing or malformed value.
    """
    namespace, unknown = parser.parse_known_args(list(command_line))
    if unknown:
        parser.refuse_unknown(unknown)
    given = vars(namespace)
    for field in (field for _, group in groups for field in dataclasses.fields(group)):
        if field.name in given:
            value = given[field.name]
            value = tuple(value) if value_count(field) is not None else value
            given[field.name] = info_of(field).values.get(value, value) if isinstance(value, str) else value
    return given


def fill(group: type[G], given: Mapping[str, Any]) -> G:
    """Make an instance of ``group`` from the values given, with defaults elsewhere."""
    names = {field.name for field in dataclasses.fields(group)}
    return group(**{name: value for name, value in given.items() if name in names})


def is_given(options: "DataclassInstance", name: str) -> bool:
    """Whether a group has a value for a field that is required or derived; complete groups always do."""
    return getattr(options, name) is not None


def missing_option(groups: Iterable["DataclassInstance"]) -> str | None:
    """The line that refuses the first required option that is not given, or ``None``."""
    for options in groups:
        for field in dataclasses.fields(options):
            required = info_of(field).required
            if required and not is_given(options, field.name):
                return f"missing option: give {spelling(field) + '; see --help' if required is True else required}"
    return None


def out_of_range(options: "DataclassInstance") -> str | None:
    """The line that refuses the first number of a group outside its bounds; ``None`` if all are within.

    Numbers that were not given are skipped.
    """
    for field in dataclasses.fields(options):
        value, bounds = getattr(options, field.name), info_of(field).bounds
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        wanted = [
            *(["finite"] if not math.isfinite(value) else []),
            *(f"{name.replace('_', ' ')} {bound}" for name, bound in bounds.items() if not _BOUNDS[name](value, bound)),
        ]
        if wanted:
            return f"{spelling(field)} {value}: must be {' and '.join(wanted)}"
    return None


class Options:
    """The options of a command: ``options[Group]`` is the instance of a group."""

    def __init__(self, instances: Collection["DataclassInstance"]):
        self._instances: dict[type, Any] = {type(instance): instance for instance in instances}

    def __getitem__(self, group: type[G]) -> G:
        instance: G = self._instances[group]
        return instance


def read_groups(
    groups: Sequence[tuple[str, "Group"]],
    command_line: Sequence[str],
    program: str,
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda given: {},
    **parser_options: Any,
) -> Options:
    """Read the options of a command, complete and within their bounds.

    Args:
        groups: ``(title, dataclass)`` pairs.
        command_line: the words after the program's name.
        program: name of the program in its help.
        defaults: function from the values given to further values, e.g. read from a file that was named; what the
            command line gives takes precedence.
        parser_options: further arguments of :func:`build_parser`.

    Raises:
        InputError: as :func:`parse`; a required option is not given; a number is outside its bounds.
    """
    given = parse(build_parser(groups, prog=program, **parser_options), command_line, groups)
    given = {**defaults(given), **given}
    instances = [fill(group, given) for _, group in groups]
    problem = missing_option(instances) or next(filter(None, map(out_of_range, instances)), None)
    if problem:
        raise InputError(problem)
    return Options(instances)


def read_options(group: type[G], command_line: Sequence[str], program: str, **parser_options: Any) -> G:
    """Read the options of a command with one group, as :func:`read_groups` does."""
    title = program.split()[-1].removesuffix(".py")
    return read_groups([(title, group)], command_line, program, **parser_options)[group]
