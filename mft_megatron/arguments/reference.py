"""The page docs/ARGUMENTS.md, made from the table of options by ``make docs``."""

import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import Any

from mft_megatron.arguments.groups.config_file import ConfigFileArguments
from mft_megatron.arguments.groups.dry_run import DRY_RUN
from mft_megatron.options import info_of, spellings, value_type

from .megatron_only import MEGATRON_ONLY
from .table import GROUPS

_HEAD = """\
# Options of pretrain_mft.py

Made by `make docs` from `mft_megatron/arguments/`; edit the options there. Names, meanings and defaults are Megatron's
(0.16.1) where the last column does not say otherwise. The same names, with `_` for `-`, are keys of a file that
`--yaml-cfg` names.
"""
_TAIL = """\
## Megatron's other options

The answer of `pretrain_mft.py` to them.
"""
_DIFFERENCE = re.compile(r"\s*Unlike in Megatron,?\s*")


def markdown() -> str:
    """Return the page: a table for each group, then the answers to Megatron's other options."""
    sections = [_HEAD]
    for title, group in (*DRY_RUN, ("configuration file", ConfigFileArguments), *GROUPS):
        rows = [_row(field) for field in dataclasses.fields(group)]
        about = " ".join((group.__doc__ or "").split())
        sections.append(f"## {title.capitalize()}\n\n{about}\n\n{_table(_COLUMNS, rows)}")
    answers: dict[str, list[str]] = {}
    for name, sentence in MEGATRON_ONLY.items():
        answers.setdefault(sentence, []).append(f"`{name}`")
    answered = [(" ".join(names), _escaped(sentence)) for sentence, names in answers.items()]
    sections.append(f"{_TAIL}\n{_table(('Options', 'Answer'), answered)}")
    return "\n".join(sections)


_COLUMNS = ("Option", "Default", "Meaning", "Differs from Megatron")


def _row(field: dataclasses.Field[Any]) -> tuple[str, str, str, str]:
    info = info_of(field)
    names = "<br>".join(f"`{name}`" for name in spellings(field))
    meaning, *difference = _DIFFERENCE.split(info.text, maxsplit=1)
    if info.choices:
        meaning += " One of " + ", ".join(f"`{choice}`" for choice in info.choices) + "."
    if info.values:
        meaning += " Also " + ", ".join(f"`{other}` = `{value}`" for other, value in info.values.items()) + "."
    if info.bounds:
        bounds = [f"{name.replace('_', ' ')} {bound}" for name, bound in info.bounds.items()]
        meaning += f" ({', '.join(bounds)})"
    different = "".join(difference)
    return names, _default(field), _escaped(meaning), _escaped(different[:1].upper() + different[1:])


def _default(field: dataclasses.Field[Any]) -> str:
    if value_type(field) is bool:
        return "off"  # a switch is off until it is given
    default = field.default
    if default is None:
        return ""
    return f"`{' '.join(map(str, default))}`" if isinstance(default, tuple) else f"`{default}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(markdown())
