"""From dataclass fields to command-line options and back.

A group of options is a frozen dataclass whose fields are made by :func:`option`; the field's name is the option's name,
its help stands beside its default. :func:`parse` turns a command line into what was *given*; defaults are filled in
later, so that an architecture read from a checkpoint can stand between the two.
"""

import argparse
import dataclasses
import json
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mft_megatron.errors import InputError
from mft_megatron.suggestions import did_you_mean


def option(
    default: Any,
    text: str,
    *,
    type: Any = None,
    choices: Sequence[Any] | None = None,
    flag: str | None = None,
    aliases: Sequence[str] = (),
    values: Mapping[str, str] | None = None,
    many: bool | int = False,
    repeated: bool = False,
    metavar: str | tuple[str, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare one option as a dataclass field.

    Args:
        default: value where the option is not given; ``None`` means "not given".
        text: the help, without the default (it is appended).
        type: ``int``, ``float``, ``str`` …; taken from ``default`` where that is not ``None``.
        choices: the values allowed.
        flag: the option's spelling where it is not the field's name, e.g. ``--disable-bias-linear``; a boolean field
            given by its flag takes the opposite of its default.
        aliases: other spellings, accepted and named in the help.
        values: other spellings of the values, e.g. ``case3`` for ``task-token``.
        many: the option takes one or more values, or exactly so many, and yields a tuple.
        at_least, above, at_most, below: where a number must lie; checked by the command, not by the parser.
        repeated: of an option with many values: it may be given several times, and the values add up.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "text": text,
            "type": type or (str if default is None else default.__class__),
            "choices": choices,
            "flag": flag,
            "aliases": tuple(aliases),
            "values": dict(values or {}),
            "many": many,
            "repeated": repeated,
            "metavar": metavar,
            "bounds": (at_least, above, at_most, below),
        },
    )


def spelling(field: dataclasses.Field) -> str:
    """The field's option as a user types it."""
    return field.metadata["flag"] or "--" + field.name.replace("_", "-")


class _OneLineParser(argparse.ArgumentParser):
    """An argument parser that raises :class:`InputError` and suggests the spelling that was probably meant.

    ``refused``: options that it does not have, and a sentence about each.
    """

    refused: Mapping[str, str] = types.MappingProxyType({})

    def error(self, message: str):
        raise InputError(f"{message}; see --help")

    def refuse_unknown(self, unknown: Sequence[str]) -> None:
        for word in unknown:
            name = word.split("=")[0].replace("_", "-")
            if name in self.refused:
                raise InputError(f"{name}: {self.refused[name]}")
        known = [spelling for action in self._actions for spelling in action.option_strings]
        for word in unknown:
            if not word.startswith("-"):
                raise InputError(f"unexpected argument {word!r}; see --help")
            name = word.split("=")[0]
            hint = did_you_mean(name.replace("_", "-"), known) or "see --help for the list"
            raise InputError(f"unknown option {name}; {hint}")


def build_parser(
    groups: Iterable[tuple[str, type]], refused: Mapping[str, str] | None = None, **parser_options: Any
) -> _OneLineParser:
    """One parser over several ``(title, dataclass)`` groups; options not given leave no trace in its namespace.

    ``refused``: options of another program that users may try, and what to say to them.
    """
    parser = _OneLineParser(allow_abbrev=False, argument_default=argparse.SUPPRESS, **parser_options)
    parser.refused = refused or {}
    for title, group in groups:
        section = parser.add_argument_group(title, (group.__doc__ or "").strip())
        for field in dataclasses.fields(group):
            _add(section, field)
    return parser


def _add(section: Any, field: dataclasses.Field) -> None:
    meta = field.metadata
    text = meta["text"]
    if meta["aliases"]:
        text += f" Also accepted: {', '.join(meta['aliases'])}."
    if meta["values"]:
        text += " Values also accepted: " + ", ".join(f"{k} = {v}" for k, v in meta["values"].items()) + "."
    names = [spelling(field), *meta["aliases"]]
    if meta["type"] is bool:
        section.add_argument(*names, dest=field.name, action="store_const", const=not field.default, help=text)
        return
    if field.default is not None:
        text += f" (default: {field.default})"
    arguments: dict[str, Any] = {"dest": field.name, "type": meta["type"], "help": text.replace("%", "%%")}
    if meta["choices"]:
        arguments["choices"] = [*meta["choices"], *meta["values"]]
        arguments["metavar"] = "{" + ",".join(map(str, meta["choices"])) + "}"
    if meta["metavar"]:
        arguments["metavar"] = meta["metavar"]
    if meta["many"]:
        arguments["nargs"] = "+" if meta["many"] is True else meta["many"]
        if meta["repeated"]:
            arguments["action"] = "extend"
    section.add_argument(*names, **arguments)


def parse(parser: _OneLineParser, command_line: Sequence[str], groups: Iterable[tuple[str, type]]) -> dict[str, Any]:
    """What the command line gave, by field name; nothing for what it did not give.

    Raises:
        InputError: an unknown option (with the nearest known one), a missing or malformed value.
    """
    namespace, unknown = parser.parse_known_args(list(command_line))
    if unknown:
        parser.refuse_unknown(unknown)
    given = vars(namespace)
    for _, group in groups:
        for field in dataclasses.fields(group):
            if field.name not in given:
                continue
            value = given[field.name]
            if field.metadata["many"]:
                value = tuple(value)
            given[field.name] = field.metadata["values"].get(value, value) if isinstance(value, str) else value
    return given


def fill(group: type, given: Mapping[str, Any]) -> Any:
    """An instance of ``group`` from the given values, defaults elsewhere."""
    names = {field.name for field in dataclasses.fields(group)}
    return group(**{name: value for name, value in given.items() if name in names})


def out_of_range(values: Any) -> str | None:
    """The first number of a group's instance that lies outside its bounds, in a line; ``None`` where all are within.

    Numbers that were not given are passed over.
    """
    for field in dataclasses.fields(values):
        value, at_least, above, at_most, below = getattr(values, field.name), *field.metadata["bounds"]
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        wanted = [
            *(["finite"] if not math.isfinite(value) else []),
            *([f"at least {at_least}"] if at_least is not None and not value >= at_least else []),
            *([f"above {above}"] if above is not None and not value > above else []),
            *([f"at most {at_most}"] if at_most is not None and not value <= at_most else []),
            *([f"below {below}"] if below is not None and not value < below else []),
        ]
        if wanted:
            return f"{spelling(field)} {value}: must be {' and '.join(wanted)}"
    return None


def read_groups(
    groups: Sequence[tuple[str, type]],
    command_line: Sequence[str],
    program: str,
    required: Sequence[str] = (),
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda given: {},
    **parser_options: Any,
) -> list[Any]:
    """The options of a command by group: an instance of each ``(title, dataclass)``, complete and within bounds.

    ``defaults``: from what was given to what else is to be taken as given, e.g. read from a file that was named.

    Raises:
        InputError: as :func:`parse`; one of the fields ``required`` is not given; a number lies outside its bounds.
    """
    given = parse(build_parser(groups, prog=program, **parser_options), command_line, groups)
    given = {**defaults(given), **given}
    instances = [fill(group, given) for _, group in groups]
    for options in instances:
        for field in dataclasses.fields(options):
            if field.name in required and getattr(options, field.name) is None:
                raise InputError(f"missing option: give {spelling(field)}; see --help")
    for options in instances:
        problem = out_of_range(options)
        if problem:
            raise InputError(problem)
    return instances


def read_options(
    group: type, command_line: Sequence[str], program: str, required: Sequence[str] = (), **parser_options: Any
) -> Any:
    """:func:`read_groups` of a command with one group."""
    title = program.split()[-1].removesuffix(".py")
    return read_groups([(title, group)], command_line, program, required, **parser_options)[0]


def number_list(text: str) -> list[float] | None:
    """``[1, 2.5]`` (MFTCoder's way to give weights) as numbers; ``None`` for anything but a list.

    Raises:
        InputError: a list of something else.
    """
    try:
        values = json.loads(text)
    except ValueError:
        return None
    if not isinstance(values, list):
        return None
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{text}: {json.dumps(value)} is not a number")
    return [float(value) for value in values]
