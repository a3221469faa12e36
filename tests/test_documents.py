"""README and docs are true: every path, link, command and option that they name exists."""

import contextlib
import functools
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "ARGUMENTS.md"  # made from the options, which another test holds
)
FOLDERS = ("mft_megatron", "tools", "docs", "tests", "csrc", "examples", "benchmarks")
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*[\w/]|(?<![\w./-])pretrain_mft\.py")
LINK = re.compile(r"\]\(([^)#\s]+)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
COMMAND = re.compile(r"(tools/\w+\.py|pretrain_mft\.py)((?: +[^\s`|#…]+)*)")
MAKE = re.compile(r"(?:^|`)make ((?:[a-z][a-z-]*)(?: [a-z][a-z-]*)*)")
SUBCOMMANDS = {
    "tools/convert_checkpoint.py": (
        *("hf-to-mcore", "mcore-to-hf", "lora-to-peft", "merge-lora", "adapters", "check", "megatron-to-mcore"),
    ),
    "tools/verify.py": ("objective", "packs"),
}
TOOLS = (
    "preprocess_data",
    "pack_data",
    "inspect_data",
    "inspect_checkpoint",
    "convert_checkpoint",
    "quantize_hf",
    "verify",
)
# Options of other programs that the documents name.
FOREIGN = {
    "torchrun": "--nproc-per-node --standalone --nnodes --rdzv-id --rdzv-backend --rdzv-endpoint --max-restarts",
    "pip": "--no-build-isolation --no-deps --dry-run --format --index-url --no-index --find-links",
    "venv": "--system-site-packages",
    "Slurm": "--nodes --ntasks-per-node --gpus-per-node --cpus-per-task --time --container-image --array --dependency",
    "docker": "--build-arg --gpus --ipc",
    "servers": """--tensor-parallel-size --served-model-name --enable-lora --max-lora-rank --lora-modules
        --generation-config --dtype --model-path --tp-size --lora-paths --model-id --port""",
    "Megatron-LM": """--dist-ckpt-strictness --use-checkpoint-args --softmax-type --qk-l2-norm --no-rope-freq
        --rope-scaling-factor --ckpt-convert-format --ckpt-format --use-rope-scaling
        --bias-gelu-fusion""",
}


@functools.cache
def help_of(script: str, *subcommand: str) -> str:
    """The help of a command of the project, as its script prints it."""
    output, before = io.StringIO(), sys.argv
    sys.argv = [script, *subcommand, "--help"]
    try:
        with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as leaving:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = before
    assert not leaving.value.code, (script, subcommand)
    return output.getvalue()


def options_of(script: str, *subcommand: str) -> set[str]:
    return set(OPTION.findall(help_of(script, *subcommand)))


@functools.cache
def known_options() -> set[str]:
    """Options of any command of the project, of its examples and benchmarks, of Megatron, and of :data:`FOREIGN`."""
    known = options_of("pretrain_mft.py") | {"--help"}
    for tool in TOOLS:
        script = f"tools/{tool}.py"
        for subcommand in SUBCOMMANDS.get(script, ()):
            known |= options_of(script, subcommand)
        known |= options_of(script)
    for folder in ("examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            known |= set(re.findall(r'add_argument\(\s*"(--[a-z0-9-]+)"', path.read_text()))
    known |= set(OPTION.findall((ROOT / "tests/golden/megatron_options.txt").read_text()))
    return known.union(*(options.split() for options in FOREIGN.values()))


def prose_and_code(text: str) -> str:
    """A document with line ends inside of a command (a backslash) joined."""
    return re.sub(r"\\\n\s*", " ", text)


def missing_paths(text: str) -> list[str]:
    # what a run or a build makes is named as "PATH/…" in other folders than those of the project
    return [name for name in PATH.findall(text) if not (ROOT / name.rstrip("/.")).exists()]


def unknown_options(text: str) -> list[str]:
    return sorted(set(OPTION.findall(text)) - known_options())


def wrong_commands(text: str) -> list[str]:
    """Commands of the project whose options belong to another command or to none."""
    wrong = []
    for script, words in COMMAND.findall(prose_and_code(text)):
        given = words.split()
        subcommand = [word for word in given[:1] if word in SUBCOMMANDS.get(script, ())]
        if SUBCOMMANDS.get(script) and given and re.fullmatch(r"[a-z]+(-[a-z]+)*", given[0]) and not subcommand:
            wrong.append(f"{script} {given[0]}: no such subcommand")
            continue
        if SUBCOMMANDS.get(script) and not subcommand:
            continue
        known = options_of(script, *subcommand) | {"--help"}
        options = [option for word in given if (option := "".join(OPTION.findall(word)[:1])) and word.startswith("--")]
        wrong += [f"{script} {' '.join(subcommand)}: {option}" for option in options if option not in known]
    return wrong


@functools.cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):[^#\n]*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


def wrong_targets(text: str) -> list[str]:
    return [name for names in MAKE.findall(text) for name in names.split()[:1] if name not in make_targets()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_documents_name_exists(path):
    text = path.read_text()
    links = [link for link in LINK.findall(text) if "://" not in link and not (path.parent / link).exists()]
    assert links == []
    assert wrong_targets(text) == []
    if path.name != "CHANGELOG.md":  # it also names what is gone
        assert missing_paths(text) == []
        assert unknown_options(text) == []
        assert wrong_commands(text) == []


def test_documents_that_docstrings_name_exist():
    sources = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path != Path(__file__)]
    named = {(name, path) for path in sources for name in re.findall(r"docs/\w+\.md", path.read_text())}
    assert [(name, str(path)) for name, path in named if not (ROOT / name).is_file()] == []


def test_a_wrong_name_is_seen():
    assert missing_paths("see `docs/DESIGNS.md` and docs/LOSSES.md.") == ["docs/DESIGNS.md"]
    assert unknown_options("`--mft-loss`, `--mft-lozz`") == ["--mft-lozz"]
    assert wrong_commands("python tools/pack_data.py --data-path x --seq-length 8 --tokenizer-model y") == [
        "tools/pack_data.py : --tokenizer-model"
    ]
    assert wrong_commands("tools/convert_checkpoint.py hf-to-hf --hf x") == [
        "tools/convert_checkpoint.py hf-to-hf: no such subcommand"
    ]
    assert wrong_targets("`make tests`") == ["tests"]


def test_make_help_lists_every_target():
    # under `make test` make would say which folder it enters
    process = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True)
    listed = {line.split()[0] for line in process.stdout.splitlines() if line}
    assert listed == make_targets()
