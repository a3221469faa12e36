"""The rooms of docs/DESIGN.md §2: a file imports its own floor's folder and lower ones, never upward or sideways."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mft_megatron"
FLOORS = {"": 0, "arguments": 1, "data": 1, "losses": 1, "mcore": 2, "convert": 3, "training": 3, "planning": 3}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def imported_modules(path: Path) -> set[str]:
    """Full names of everything a file imports, at its top or inside a function."""
    package = ("mft_megatron", *path.relative_to(PACKAGE).parent.parts)
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, node.module or "")).strip(".")
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def forbidden(path: Path) -> list[str]:
    room = room_of(path)
    found = []
    for name in sorted(imported_modules(path)):
        parts = name.split(".")
        if parts[0] == "megatron" and room != "mcore":
            found.append(f"{name}: only mcore imports Megatron-Core")
        if name.startswith("torch.cuda") and room != "mcore":
            found.append(f"{name}: only mcore asks for CUDA")
        if parts[0] == "torch" and room in ("", "data"):
            found.append(f"{name}: the data room and floor 0 work without torch")
        if name.startswith("torch.distributed") and room == "losses":
            found.append(f"{name}: losses know no process groups")
        other = parts[1] if parts[0] == "mft_megatron" and len(parts) > 1 else room
        if other in FLOORS and other != room and FLOORS[other] >= FLOORS[room]:
            found.append(f"{name}: {room or 'floor 0'} may not import {other}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    assert forbidden(path) == []


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("data/x.py", "import torch"),
        ("data/x.py", "from mft_megatron.losses import coefficients"),
        ("losses/x.py", "import torch.distributed as dist"),
        ("losses/x.py", "def f():\n    from ..mcore import parallel"),
        ("training/x.py", "from megatron.core import parallel_state"),
        ("training/x.py", "from mft_megatron.convert import hf_export"),
        ("training/x.py", "import torch.cuda"),
        ("batch.py", "from .data import dataset"),
    ],
)
def test_the_rule_sees_a_breach(place, source, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(source)
    assert forbidden(tmp_path / place)


def test_cuda_is_asked_for_in_one_room_only():
    """``torch.cuda.is_available()`` and the like need no import of torch.cuda, so imports do not show them."""
    for path in FILES:
        if room_of(path) != "mcore":
            assert "torch.cuda" not in path.read_text(), path
