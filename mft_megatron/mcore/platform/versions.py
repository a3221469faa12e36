"""Releases of torch and Megatron-Core that this package is known to run on, in one table.

An older release, and a pair that cannot work, are refused before anything is imported that would fail; a newer release
is warned about. Nothing else asks for a version number: differences between releases are handled by
capability (:mod:`.releases`). A pre-release counts as the release that it precedes, as vendors build theirs: 2.10.0a0
as 2.10.
"""

import ast
import dataclasses
import importlib.util
import inspect
import re
from pathlib import Path

import torch
from packaging.version import InvalidVersion, Version
from torch.distributed.checkpoint.state_dict_loader import load

from mft_megatron.errors import InputError


@dataclasses.dataclass(frozen=True)
class Known:
    """Releases of a package that this one was tested with.

    Attributes:
        name: in messages.
        oldest: the first release.
        newest: the last series of releases, whatever its patch.
        install: what pip installs.
    """

    name: str
    oldest: tuple[int, ...]
    newest: tuple[int, int]
    install: str


MEGATRON_CORE = Known("Megatron-Core", (0, 16, 1), (0, 19), "megatron-core>=0.16.1,<0.20")
TORCH = Known("torch", (2, 6), (2, 14), "torch>=2.6")
# its checkpoints are loaded by torch.distributed.checkpoint.load(no_dist=True), which torch has since 2.7
NEEDS_NO_DIST = (0, 18)


def check_installed() -> list[str]:
    """Refuse installed releases that cannot work, without importing Megatron-Core.

    Returns:
        warnings about releases that are not known, a line each.

    Raises:
        InputError: a release is missing or too old, or the two cannot work together.
    """
    has_no_dist = "no_dist" in inspect.signature(load).parameters
    return check(_megatron_core(), str(torch.__version__), has_no_dist)


def check(megatron_core: str | None, torch_version: str, has_no_dist: bool = True) -> list[str]:
    """Compare versions with the table, as :func:`check_installed` does.

    Args:
        megatron_core: its version, ``None`` if it is not installed.
        torch_version: that of torch.
        has_no_dist: whether torch's function that loads a checkpoint has the argument ``no_dist``.
    """
    if megatron_core is None:
        raise InputError(f"Megatron-Core is not installed: pip install '{MEGATRON_CORE.install}'")
    warnings = [_compare(MEGATRON_CORE, megatron_core), _compare(TORCH, torch_version)]
    release = _release(megatron_core)
    if release is not None and release >= NEEDS_NO_DIST and not has_no_dist:
        raise InputError(
            f"Megatron-Core {megatron_core} cannot load checkpoints with torch {torch_version}, whose "
            "torch.distributed.checkpoint.load lacks the argument no_dist; install torch>=2.7, or "
            "'megatron-core>=0.16.1,<0.18'"
        )
    return [warning for warning in warnings if warning]


def _compare(known: Known, version: str) -> str:
    """Warn about a version that is not known, in a line; empty if it is known."""
    release = _release(version)
    oldest, newest = (".".join(map(str, numbers)) for numbers in (known.oldest, known.newest))
    if release is None:
        return f"{known.name} has the version {version!r}, which cannot be compared with {oldest} to {newest}"
    if release < known.oldest:
        raise InputError(
            f"{known.name} {version} is too old, {oldest} or newer is needed: pip install '{known.install}'"
        )
    if release[:2] > known.newest:
        return f"{known.name} {version} is newer than the releases this package was tested with, {oldest} to {newest}"
    return ""


def _release(version: str) -> tuple[int, ...] | None:
    try:
        return Version(version).release
    except InvalidVersion:
        return None


def _megatron_core() -> str | None:
    """Read the version of Megatron-Core in its source, as a checkout on the path has no other record of it."""
    try:
        spec = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None:
        return None
    try:
        source = (Path(spec.origin).parent / "package_info.py").read_text()
        values = dict(re.findall(r"^(MAJOR|MINOR|PATCH|PRE_RELEASE) *= *(.+)$", source, re.MULTILINE))
        numbers = {name: ast.literal_eval(value) for name, value in values.items()}
        return "{MAJOR}.{MINOR}.{PATCH}{PRE_RELEASE}".format(**numbers)
    except (OSError, KeyError, ValueError, SyntaxError):
        return "unknown"
