"""Docstrings: the first line stands alone, and everything public has one."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("mft_megatron", "tools", "examples", "benchmarks", "tests")
FILES = [ROOT / "pretrain_mft.py", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
# words with which a line only goes on from the name above it
FRAGMENTS = ("Of", "By", "As", "To", "What", "Where", "Which")
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def fragments(source: str) -> list[str]:
    """Docstrings that begin in the middle of a sentence, as "line: first words"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        docstring = ast.get_docstring(node) if isinstance(node, DEFINITIONS) else None
        if docstring and docstring.split()[0].rstrip(",:") in FRAGMENTS:
            found.append(f"{getattr(node, 'lineno', 1)}: {docstring.splitlines()[0][:60]}")
    return found


def undocumented(source: str) -> list[str]:
    """Public modules, classes, functions and methods without a docstring, as "line: name"."""
    tree, found = ast.parse(source), []

    def visit(node: ast.AST, names: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                public = not child.name.startswith("_")
                # a field of a Protocol is explained where it is implemented
                stub = isinstance(child, ast.FunctionDef) and ast.unparse(child.body[-1]) == "..."
                setter = any(".setter" in ast.unparse(decorator) for decorator in child.decorator_list)
                if public and not stub and not setter and not ast.get_docstring(child):
                    found.append(f"{child.lineno}: {'.'.join((*names, child.name))}")
                if isinstance(child, ast.ClassDef) and public:
                    visit(child, (*names, child.name))

    if not ast.get_docstring(tree):
        found.append("1: the module")
    visit(tree, ())
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_first_lines_stand_alone(path):
    assert fragments(path.read_text()) == []


@pytest.mark.parametrize("path", [path for path in FILES if path.is_relative_to(ROOT / "mft_megatron")], ids=str)
def test_everything_public_is_documented(path):
    assert undocumented(path.read_text()) == []


def test_the_rules_see_a_breach():
    assert fragments('"""Module."""\ndef f():\n    """Of a thing."""') == ["2: Of a thing."]
    assert fragments('def f():\n    """Offer a thing."""') == []
    assert undocumented('"""M."""\nclass A:\n    """A."""\n    def f(self): return 1\n    def _g(self): return 2') == [
        "4: A.f"
    ]
