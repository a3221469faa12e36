"""The table of patches: each has a reason, and a test that exists and shows that it is still needed."""

import ast
from pathlib import Path

import pytest

from mft_megatron.mcore.platform import patches

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", patches.PATCHES)
def test_every_patch_has_a_reason_and_a_test(name):
    patch = patches.PATCHES[name]
    assert patch.apply.__doc__
    file, _, test = patch.needed.partition("::")
    functions = [node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    assert test in functions


def test_every_function_that_replaces_is_in_the_table():
    listed = {patch.apply.__name__ for patch in patches.PATCHES.values()}
    for module in (patches.without_cuda, patches.megatron_fixes):
        tree = ast.parse(Path(module.__file__).read_text())
        public = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"}
        assert public
        assert public <= listed
    for module in (patches.cuda_functions, patches.process_group):
        tree = ast.parse(Path(module.__file__).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        replacing = {name for name in functions if name.startswith("replace_")}
        assert replacing
        assert replacing <= listed


def test_every_fix_is_called_by_a_layer():
    layers = [path for path in (ROOT / "mft_megatron/mcore").rglob("*.py") if path.parent.name != "platform"]
    calls = {
        node.func.id
        for path in layers
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert {patch.apply.__name__ for patch in patches.WHERE_NEEDED.values()} <= calls


def test_patches_for_cpus_are_applied_once(monkeypatch):
    applied = []
    table = {name: patches.Patch(lambda name=name: applied.append(name), "") for name in ("first", "second")}
    monkeypatch.setattr(patches, "WITHOUT_CUDA", table)
    patches.apply_without_cuda.cache_clear()
    patches.apply_without_cuda()
    patches.apply_without_cuda()
    assert applied == ["first", "second"]
