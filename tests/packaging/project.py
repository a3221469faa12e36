"""Bounds in pyproject.toml and pins in the files of constraints, as tests read them."""

import functools
import re
from collections.abc import Iterable

from packaging.requirements import Requirement

from tests.ranks import ROOT

try:
    import tomllib
except ImportError:  # Python 3.10: pytest brings it there
    import tomli as tomllib


@functools.cache
def pyproject() -> dict:
    """The tables of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def name_of(requirement: Requirement) -> str:
    """The normalised name of what is required."""
    return re.sub("[-_.]+", "-", requirement.name).lower()


def requirements(lines: Iterable[str]) -> dict[str, Requirement]:
    """Requirements by normalised name."""
    return {name_of(requirement): requirement for requirement in map(Requirement, lines)}


def pins(name: str, python: str) -> dict[str, str]:
    """Pinned versions by normalised name that a file of constraints has for a Python such as "3.12"."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    found = {}
    for requirement in map(Requirement, lines):
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        assert name_of(requirement) not in found, f"{name}: two pins of {requirement.name} for Python {python}"
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        found[name_of(requirement)] = specifier.version
    return found
