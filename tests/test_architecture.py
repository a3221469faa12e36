"""The rules of docs/ARCHITECTURE.md: what a file may import, how many modules a folder has, what ``__init__`` holds."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mft_megatron"
FLOORS = {
    "parsing": -1,
    "": 0,
    "run_folder": 0,
    "arguments": 1,
    "data": 1,
    "losses": 1,
    "mcore": 2,
    "convert": 3,
    "training": 3,
    "verify": 4,
    "dry_run": 4,
}
# A file imports from its own sub-package and from those listed before it; "a|b" are modules at the top of the room.
ORDER = {
    "run_folder": (
        "names|publishing|space|replace_text|file_hash|manifest|files|content|configuration|tokenizer|outcome",
        "starts|description",
        "verification|found",
        "retention",
        "owner",
        "inspection",
    ),
    "data": (
        "sample_slices|permutation|_sample_index|_mapped_files",
        *("storage", "tokenizers", "records", "chat_templates", "packing", "tasks", "loading", "preprocessing"),
        "command_options|ledger_table|inspect",
        "inspect_packs",
        "command",
    ),
    "mcore": (
        *("platform", "kernels", "parallel", "attention", "moe", "output_layer", "adapters", "model", "optim"),
        *("trainer", "checkpointing", "inference", "reference_model"),
    ),
    "convert": (
        *("atomic_folder", "huggingface", "peft", "megatron", "serving", "commands", "background_export", "run_start"),
    ),
    "verify": ("packs|objective", "command"),
    "dry_run": (
        *(
            "rank_report|measured_steps",
            "code_lines|operations|memory_account|step_counters",
            "other_peaks",
            "rank_run",
            "mock_data|model_description|refusals|processes",
            "start",
            "report",
        ),
        "command",
    ),
    "arguments": (
        *("values", "groups", "stages|table|megatron_only|without_effect", "checks"),
        "adapters|auto_resume|start|completion|config_syntax|config_file|notes|reference|command",
    ),
    "losses": ("segments|supervision|focal|table|objective", "balancers"),
}
# Importing one of these imports no Megatron-Core and replaces nothing in torch.
WITHOUT_MEGATRON = (
    "mcore.adapters.nf4",
    "mcore.attention.cuda_kernels",
    "mcore.attention.sdpa",
    "mcore.checkpointing.tensor_reader",
    "mcore.checkpointing.vocabulary",
    "mcore.checkpointing.weight_source",
    "mcore.kernels.layer_norm",
    "mcore.kernels.mixed_products",
    "mcore.kernels.norm_triton",
    "mcore.kernels.rms_norm",
    "mcore.kernels.rotary",
    "mcore.kernels.rotary_triton",
    "mcore.model.rope_frequencies",
    "mcore.output_layer.fused_cross_entropy",
    "mcore.parallel.attention_spans",
    "mcore.platform.optional_packages",
    "mcore.platform.precisions",
)
# tables of similar files may have more modules
MOST_MODULES = 16
TABLES = ("arguments/groups", "arguments/checks", "convert/huggingface/families")
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


def position_in_order(room: str, name: str) -> int:
    """Position in ``ORDER`` of a sub-package, or of a module at the top of a room."""
    for position, names in enumerate(ORDER[room]):
        if name in names.split("|"):
            return position
    raise AssertionError(f"mft_megatron/{room}/{name} is not in ORDER: add it after those that it imports")


def forbidden(path: Path) -> list[str]:
    """Imports of a file that break a rule, each with the rule."""
    room = room_of(path)
    inner = path.relative_to(PACKAGE).parts[1:]
    breaches = []
    for name in sorted(imported_modules(path)):
        parts = name.split(".")
        if parts[0] == "megatron" and room != "mcore":
            breaches.append(f"{name}: only mcore imports Megatron-Core")
        if name.startswith("torch.cuda") and room != "mcore":
            breaches.append(f"{name}: only mcore asks for CUDA")
        if parts[0] == "torch" and room in ("", "parsing", "run_folder", "data"):
            breaches.append(f"{name}: the data room and the floors below it work without torch")
        if name.startswith("torch.distributed") and room == "losses":
            breaches.append(f"{name}: losses use no process groups")
        if parts[0] != "mft_megatron" or len(parts) < 2:
            continue
        other = parts[1]
        if other in FLOORS and other != room and FLOORS[other] >= FLOORS[room]:
            breaches.append(f"{name}: {room or 'floor 0'} may not import {other}")
        inside = other == room and room in ORDER and len(parts) > 2 and path.name != "__init__.py"
        if inside and position_in_order(room, parts[2]) > position_in_order(room, inner[0].removesuffix(".py")):
            breaches.append(f"{name}: {room}/{inner[0]} may not import {parts[2]}, which comes later in ORDER")
    return breaches


def modules_of(path: Path) -> set[Path]:
    """Files of the package that a file imports."""
    modules = set()
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] == "mft_megatron":
            for end in (len(parts), len(parts) - 1):
                candidate = PACKAGE.joinpath(*parts[1:end]).with_suffix(".py")
                if candidate.is_file():
                    modules.add(candidate)
                    break
    return modules - {path}


def import_cycle(graph: dict[Path, set[Path]]) -> list[Path]:
    """Find a chain of imports that returns to its first file; empty if there is none."""
    done: set[Path] = set()

    def visit(path: Path, chain: list[Path]) -> list[Path]:
        if path in chain:
            return [*chain[chain.index(path) :], path]
        if path in done:
            return []
        for other in sorted(graph.get(path, ())):
            if cycle := visit(other, [*chain, path]):
                return cycle
        done.add(path)
        return []

    return next((cycle for path in sorted(graph) if (cycle := visit(path, []))), [])


def third_party_names(tree: ast.AST) -> set[str]:
    """Names in a file that are modules, classes or functions of Megatron-Core or torch."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                module = node.module or "" if isinstance(node, ast.ImportFrom) and not node.level else alias.name
                if module.split(".")[0] in ("megatron", "torch"):
                    names.add(alias.asname or alias.name.split(".")[0])
    return names


def targets_of(node: ast.AST) -> list[ast.expr]:
    """Expressions that a statement, or a call of ``setattr`` or ``delattr``, assigns to or deletes."""
    if isinstance(node, ast.Assign | ast.Delete):
        targets = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
        targets = [ast.Attribute(node.args[0], ast.unparse(node.args[1]).strip("'"))]
    else:
        return []
    return [single for target in targets for single in (target.elts if isinstance(target, ast.Tuple) else [target])]


def is_patch(target: ast.expr, third_party: set[str]) -> bool:
    """Whether an assignment replaces a class, defaults, ``sys.modules`` entries or attributes of third-party code."""
    if isinstance(target, ast.Subscript):
        return ast.unparse(target.value) == "sys.modules"
    if not isinstance(target, ast.Attribute):
        return False
    root: ast.expr = target
    while isinstance(root, ast.Attribute | ast.Subscript | ast.Call):
        root = root.func if isinstance(root, ast.Call) else root.value
    return (
        target.attr in ("__class__", "__defaults__", "__code__")
        or (isinstance(root, ast.Name) and root.id in third_party)
        or "import_module" in ast.unparse(target)
    )


def patches_in(path: Path) -> list[str]:
    """Everything that a file replaces in Megatron-Core and torch."""
    tree = ast.parse(path.read_text())
    names = third_party_names(tree)
    return [ast.unparse(target) for node in ast.walk(tree) for target in targets_of(node) if is_patch(target, names)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_patches_are_in_one_folder(path):
    if not path.is_relative_to(PACKAGE / "mcore/platform"):
        assert patches_in(path) == [], "patches of Megatron-Core and torch are in mcore/platform, see its patches.py"


@pytest.mark.parametrize(
    "source",
    [
        "def f(module, kind):\n    module.__class__ = kind",
        "class A:\n    def f(self, kind):\n        self.output_layer.__class__ = kind",
        "from megatron.core.tensor_parallel import random\nrandom.Checkpoint.__init__.__defaults__ = (None,)",
        "import sys\nsys.modules['megatron.core.jit'] = None",
        "import torch\ntorch.Tensor.cuda = None",
        "import torch as t\nt.cuda.Stream, a = None, None",
        "from torch import Tensor\nTensor.type = None",
        "def f():\n    from megatron.core.transformer.moe import moe_utils\n    moe_utils.te_general_gemm = None",
        "from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler as Scaler\nScaler.scale = None",
        "import megatron.core.utils\nsetattr(megatron.core.utils, 'name', None)",
        "import megatron.core.utils\ndel megatron.core.utils.name",
        "import importlib\nimportlib.import_module('megatron.core.utils').torch = None",
    ],
)
def test_the_rule_finds_a_patch(source, tmp_path):
    (tmp_path / "x.py").write_text(source)
    assert len(patches_in(tmp_path / "x.py")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nx = torch.empty(3)\nx[0] = 1\nx.grad = None",
        "class A:\n    def f(self):\n        self.weight.sequence_parallel = True",
    ],
)
def test_the_rule_allows_changes_of_objects(source, tmp_path):
    (tmp_path / "x.py").write_text(source)
    assert patches_in(tmp_path / "x.py") == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    assert forbidden(path) == []


def test_no_import_cycles():
    assert import_cycle({path: modules_of(path) for path in FILES}) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("data/inspect.py", "import torch"),
        ("data/inspect.py", "from mft_megatron.losses import segments"),
        ("losses/focal.py", "import torch.distributed as dist"),
        ("losses/focal.py", "def f():\n    from ..mcore import parallel"),
        ("training/x.py", "from megatron.core import parallel_state"),
        ("training/x.py", "from mft_megatron.convert import huggingface"),
        ("training/x.py", "import torch.cuda"),
        ("batch.py", "from .data import dataset"),
        ("data/storage/ledger.py", "from mft_megatron.data.packing import packs"),
        ("data/storage/ledger.py", "def f():\n    from mft_megatron.data import command"),
        ("mcore/parallel/data_parallel.py", "from mft_megatron.mcore.adapters.lora import add_adapters"),
        ("mcore/optim/optimizer.py", "import mft_megatron.mcore.trainer"),
        ("convert/huggingface/family.py", "from mft_megatron.convert.peft import merge"),
        ("arguments/values/window.py", "from mft_megatron.arguments.table import Arguments"),
    ],
)
def test_the_rule_finds_a_breach(file, source, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(source)
    assert forbidden(tmp_path / file)


def test_the_rule_finds_an_import_cycle():
    a, b, c = (Path(name) for name in "abc")
    assert import_cycle({a: {b}, b: {c}, c: {a}}) == [a, b, c, a]
    assert import_cycle({a: {b, c}, b: {c}}) == []


def test_a_new_sub_package_must_be_in_the_order():
    with pytest.raises(AssertionError, match="mft_megatron/data/extras is not in ORDER"):
        position_in_order("data", "extras")


def test_only_one_room_uses_cuda():
    """Search the text too: ``torch.cuda.is_available()`` works without an import of torch.cuda."""
    for path in FILES:
        if room_of(path) != "mcore":
            assert "torch.cuda" not in path.read_text(), path


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=str)
def test_a_package_exports_no_names(path):
    """Each name has one import path: an ``__init__.py`` holds a docstring, the top one also the version."""
    docstring, *others = ast.parse(path.read_text()).body
    assert isinstance(docstring, ast.Expr)
    version = [f"{target.id}" for node in others if isinstance(node, ast.Assign) for target in node.targets]
    assert version == (["__version__"] if path.parent == PACKAGE else []), path
    assert len(others) == len(version), path


@functools.cache
def names_of(module: str) -> set[str]:
    """Names that a module of the package defines or imports, at any depth; modules of a folder."""
    path = PACKAGE.parent / module.replace(".", "/")
    if path.is_dir():
        return {file.name.split(".")[0] for file in path.iterdir()}
    names = set()
    for node in ast.walk(ast.parse(path.with_suffix(".py").read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def absent_imports(path: Path) -> list[str]:
    """Names that a file imports from modules of the package which do not have them."""
    wanted = {
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mft_megatron.")
        for alias in node.names
    }
    compiled = {"mft_megatron.data._sample_index", "mft_megatron.data._mapped_files"}
    return sorted(
        f"{module}.{name}" for module, name in wanted if module not in compiled and name not in names_of(module)
    )


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "tests", "tools"])
def test_what_is_imported_of_the_package_is_there(folder):
    """Some of these files are run by slow tests alone, and a function that is renamed is missed there."""
    files = sorted((PACKAGE.parent / folder).rglob("*.py"))
    assert {str(path): absent for path in files if (absent := absent_imports(path))} == {}


def test_number_of_modules_in_a_folder():
    folders = {path.parent for path in FILES}
    for folder in folders:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MOST_MODULES or str(folder.relative_to(PACKAGE)) in TABLES, folder


def test_megatron_core_is_patched_before_it_is_imported():
    """A module that imports Megatron-Core imports ``mcore.platform.patched`` first."""
    patched = "mft_megatron.mcore.platform.patched"
    for path in FILES:
        if "platform" in path.parts:
            continue
        lines = path.read_text().splitlines()
        imports = [line for line in lines if line.lstrip().startswith(("import ", "from "))]
        if any(line.split()[1].split(".")[0] == "megatron" for line in imports):
            assert imports[0].split()[1] == patched, f"{path}: the first import has to be {patched}"


def imports_megatron_core(modules: Iterable[str]) -> str:
    """The first of these modules whose import imports Megatron-Core or replaces a method of torch; "" if none does."""
    code = (
        "import importlib, sys, torch\n"
        "before = torch.Tensor.type\n"
        "for module in sys.argv[1:]:\n"
        "    importlib.import_module(f'mft_megatron.{module}')\n"
        "    if 'megatron' in sys.modules or torch.Tensor.type is not before:\n"
        "        print(module)\n"
        "        break\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, *modules]
    return subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True).stdout.strip()


def test_what_needs_no_megatron_core_imports_none():
    assert imports_megatron_core(WITHOUT_MEGATRON) == ""
    assert imports_megatron_core(["mcore.parallel.process_groups"]) == "mcore.parallel.process_groups"


def test_the_data_commands_start_without_what_only_templates_need():
    code = "import sys; import mft_megatron.data.command; print('jinja2' in sys.modules, 'torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert process.stdout == "False False\n", process.stderr
