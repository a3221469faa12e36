"""The table of releases: what cannot work is refused in a line, what is not known is warned about once."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.checkpoint.state_dict_loader import load

from mft_megatron.errors import InputError
from mft_megatron.mcore.platform import versions
from tests.ranks import ROOT
from tests.refusals import refused_call


@pytest.mark.parametrize(
    ("megatron_core", "torch"),
    [
        ("0.16.1", "2.6.0"),
        ("0.17.0", "2.13.0+cpu"),
        ("0.19.0rc1", "2.14.1"),
        ("0.19.12", "2.10.0a0+b4e4ee8.nv25.12"),
        ("0.18.2+a1b2c3d", "2.6.0a0+ecf3bae40a.nv25.01"),
    ],
)
def test_known_releases(megatron_core, torch):
    assert versions.check(megatron_core, torch) == []


@pytest.mark.parametrize(
    ("megatron_core", "torch", "said"),
    [
        (None, "2.13.0", "Megatron-Core is not installed: pip install 'megatron-core>=0.16.1,<0.20'"),
        ("0.15.3", "2.13.0", "Megatron-Core 0.15.3 is too old, 0.16.1 or newer is needed: pip install 'megatron-core>"),
        ("0.16.0", "2.13.0", "Megatron-Core 0.16.0 is too old"),
        ("0.16.1", "2.5.1+cu124", "torch 2.5.1+cu124 is too old, 2.6 or newer is needed: pip install 'torch>=2.6'"),
        ("0.19.2", "2.5.0a0+872d972e41.nv24.08", "torch 2.5.0a0+872d972e41.nv24.08 is too old"),
    ],
)
def test_what_cannot_work_is_refused(megatron_core, torch, said):
    assert refused_call(versions.check, megatron_core, torch).startswith(said)


@pytest.mark.parametrize("megatron_core", ["0.18.0rc0", "0.19.2", "0.20.0"])
def test_a_pair_that_cannot_work_is_refused(megatron_core):
    with pytest.raises(InputError, match=r"with torch 2.6.0, .* install torch>=2.7, or 'megatron-core>=0.16.1,<0.18'"):
        versions.check(megatron_core, "2.6.0", has_no_dist=False)
    assert versions.check("0.17.1", "2.6.0", has_no_dist=False) == []


@pytest.mark.parametrize(
    ("megatron_core", "torch", "said"),
    [
        (
            "0.20.0",
            "2.13.0",
            ["Megatron-Core 0.20.0 is newer than the releases this package was tested with"],
        ),
        ("0.20.0rc2", "2.15.0a0+x.nv26.12", ["Megatron-Core 0.20.0rc2 is newer", "torch 2.15.0a0+x.nv26.12 is newer"]),
        ("1.0", "3.0", ["Megatron-Core 1.0 is newer", "torch 3.0 is newer"]),
        ("0.19.2", "2.13-unknown build", ["torch has the version '2.13-unknown build', which cannot be compared"]),
    ],
)
def test_what_is_not_known_is_warned_about(megatron_core, torch, said):
    warnings = versions.check(megatron_core, torch)
    assert [warning[: len(words)] for warning, words in zip(warnings, said, strict=True)] == said


def test_the_installed_releases_are_read_without_an_import():
    import megatron.core

    assert versions._megatron_core() == megatron.core.__version__.partition("+")[0]
    assert versions.check_installed() == []


@pytest.mark.parametrize(
    "source", [None, "MAJOR = 0\nMINOR = 19\nPATCH = 2\n", "MAJOR = 0\nMINOR = 19\nPATCH = f()\nPRE_RELEASE = ''\n"]
)
def test_a_version_that_cannot_be_read_is_warned_about(tmp_path, monkeypatch, source):
    if source is not None:
        (tmp_path / "package_info.py").write_text(source)
    spec = importlib.util.spec_from_file_location("megatron.core", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    (warning,) = versions.check_installed()
    assert warning.startswith("Megatron-Core has the version 'unknown', which cannot be compared with 0.16.1 to 0.19")


def _run(folder, minor, command, **environment):
    """Run a command with the installed Megatron-Core, which says that it is release 0.``minor``."""
    package = folder / "megatron" / "core"
    package.mkdir(parents=True)
    for file in Path(importlib.util.find_spec("megatron.core").origin).parent.iterdir():
        (package / file.name).symlink_to(file)
    source = (package / "package_info.py").read_text()
    (package / "package_info.py").unlink()
    (package / "package_info.py").write_text(re.sub(r"^MINOR = \d+", f"MINOR = {minor}", source, flags=re.MULTILINE))
    paths = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120
    )


def test_a_tool_refuses_in_a_line(tmp_path):
    checkpoint = tmp_path / "run"
    command = ["tools/convert_checkpoint.py", "hf-to-mcore", "--hf", str(tmp_path), "--save", str(checkpoint)]
    process = _run(tmp_path / "old", 15, command)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("error: Megatron-Core 0.15.")
    assert "Traceback" not in process.stderr


@pytest.mark.skipif(
    "no_dist" not in inspect.signature(load).parameters, reason="this torch is refused with any newer Megatron-Core"
)
@pytest.mark.parametrize(("rank", "times"), [("0", 1), ("1", 0)])
def test_one_rank_warns_once(tmp_path, rank, times):
    code = "import mft_megatron.mcore.platform.patched, mft_megatron.mcore.model.config"
    process = _run(tmp_path / "new", 99, ["-c", code], RANK=rank)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("warning: Megatron-Core 0.99.") == times
