"""A virtual environment without network, pip's settings set aside, and a copy of what a build reads."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.ranks import ROOT

SOURCES = (
    *("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "constraints.txt", "constraints-oldest.txt"),
    *("README.md", "LICENSE", "CHANGELOG.md", "pretrain_mft.py", "tools", "csrc", "mft_megatron"),
)


class Environment:
    """A new virtual environment that the pip of this one installs into.

    Attributes:
        python: its interpreter.
    """

    def __init__(self, folder: Path, index: Path):
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        self._index = index
        # what a user or a machine has told pip must not reach the tests
        self._variables = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        self._variables |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONPATH": ""}

    def pip(self, *words: str | Path, **variables: str) -> subprocess.CompletedProcess:
        """Run pip for this environment, with the folder of stand-ins as its only index."""
        command = [sys.executable, "-m", "pip", "--python", self.python, *words]
        if words[0] == "install":
            command += ["--no-index", "--find-links", self._index]
        return subprocess.run(command, cwd=ROOT, env=self._variables | variables, capture_output=True, text=True)

    def run(self, *words: str | Path, **variables: str) -> subprocess.CompletedProcess:
        """Run its interpreter outside of the checkout."""
        folder = self.python.parent
        return subprocess.run(
            [self.python, *words], cwd=folder, env=self._variables | variables, capture_output=True, text=True
        )

    def versions(self) -> dict[str, str]:
        """Version of each installed distribution, by its name."""
        process = self.pip("list", "--format=freeze")
        assert process.returncode == 0, process.stderr
        return dict(line.split("==") for line in process.stdout.split())


@pytest.fixture
def environment(tmp_path):
    """An empty environment, and an empty folder of wheels beside it: ``tmp_path / "wheels"``."""
    (tmp_path / "wheels").mkdir()
    return Environment(tmp_path / "environment", tmp_path / "wheels")


@pytest.fixture(scope="session")
def source_copy(tmp_path_factory):
    """The files that a build reads, in a temporary folder: nothing of the checkout is overwritten."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder
