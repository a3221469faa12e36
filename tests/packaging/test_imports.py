"""Every module can be imported with the base dependencies alone."""

import ast
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from tests.packaging.project import pyproject, requirements
from tests.ranks import ROOT


def base_packages():
    """Top-level modules of the base dependencies."""
    names = requirements(pyproject()["project"]["dependencies"])
    # from the files: packages_distributions of Python 3.10 does not know packages without top_level.txt
    files = [file for name in names for file in importlib.metadata.files(name)]
    return {file.parts[0].removesuffix(".py") for file in files if file.suffix == ".py"}


def imported_at_the_top(source):
    """Top-level names that importing a module imports, without those in a function, ``try`` or ``if TYPE_CHECKING``."""
    names = set()
    nodes = list(ast.parse(source).body)
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            nodes += node.body + node.orelse
        elif isinstance(node, ast.ClassDef | ast.With | ast.For):
            nodes += node.body
    return names - sys.stdlib_module_names


def test_modules_import_only_base_dependencies():
    allowed = base_packages() | {"mft_megatron", "tools"}
    assert {"torch", "megatron", "yaml"} < allowed
    assert not {"pytest", "peft", "matplotlib", "wandb", "bitsandbytes", "transformer_engine"} & allowed
    for path in [*(ROOT / "mft_megatron").rglob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "pretrain_mft.py"]:
        assert imported_at_the_top(path.read_text()) <= allowed, path


def test_an_import_at_the_top_is_seen():
    assert imported_at_the_top("import peft.tuners\nfrom os import path\ndef f():\n    import wandb\n") == {"peft"}
    assert imported_at_the_top("if TYPE_CHECKING:\n    import peft\nif x:\n    from peft import y\n") == {"peft"}


def test_every_module_can_be_imported(tmp_path):
    process = subprocess.run(
        [sys.executable, ROOT / "tests/packaging/import_every_module.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    count = int(process.stdout.split()[0])
    assert count > len(list(Path(ROOT / "mft_megatron").rglob("*.py")))
