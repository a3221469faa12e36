"""Workflows and the Dockerfile are readable, and what they name exists."""

import re
import shlex
from fnmatch import fnmatch

import pytest
import yaml

from tests.packaging.project import pyproject
from tests.ranks import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
# first words of commands that come from elsewhere
FOREIGN = {"pip", "python", "cd", "cibuildwheel"}


def jobs_of(path):
    # YAML 1.1 reads the key "on" as true
    workflow = yaml.safe_load(path.read_text())
    assert {"name", True, "permissions", "jobs"} <= set(workflow)
    return workflow["jobs"]


def commands_of(path):
    """Each shell command of a workflow, as words."""
    lines = [step["run"] for job in jobs_of(path).values() for step in job["steps"] if "run" in step]
    return [shlex.split(part) for line in lines for part in re.split(r"&&|\n", line)]


def missing_files(words):
    paths = [word.partition("$GITHUB_WORKSPACE/")[2] or word for word in words]
    named = [path for path in paths if path.endswith((".py", ".txt")) or path.startswith(("tests/", "tools/"))]
    return [path for path in named if not (ROOT / path).exists()]


def unknown_targets(words):
    """Targets and variables of a make command that the Makefile does not have."""
    makefile = (ROOT / "Makefile").read_text()
    named = [word.partition("=") for word in words[1:]]
    return [
        name
        for name, equals, _ in named
        if not re.search(rf"^{name} *\?= " if equals else rf"^{name}:.*## ", makefile, re.MULTILINE)
    ]


def test_there_is_a_job_for_each_check():
    jobs = {name: job for path in WORKFLOWS for name, job in jobs_of(path).items()}
    assert set(jobs) == {"lint", "test", "newest", "oldest", "base-dependencies", "sdist", "wheels"}
    pythons = [line.rpartition(" ")[2] for line in pyproject()["project"]["classifiers"] if "Python :: 3." in line]
    assert jobs["test"]["strategy"]["matrix"]["python"] == pythons
    (install,) = [step["run"] for step in jobs["base-dependencies"]["steps"] if "pip install" in step.get("run", "")]
    assert shlex.split(install)[-1] == "."  # no extra


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_commands_of_workflows_exist(path):
    commands = commands_of(path)
    assert commands
    for words in commands:
        assert words[0] in {*FOREIGN, "make"}
        assert missing_files(words) == []
        if words[0] == "make":
            assert unknown_targets(words) == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_the_wanted_pythons_are_set_up_in_each_job(path):
    for name, job in jobs_of(path).items():
        (setup,) = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
        assert isinstance(setup, str), f"{name}: 3.10 without quotes is the number 3.1"
        if setup.startswith("${{"):
            assert all(isinstance(python, str) for python in job["strategy"]["matrix"]["python"])


def test_wrong_names_are_seen():
    assert unknown_targets(["make", "test-newer", "PYTHON_NEWEST=x", "PYTHON_NEXT=x"]) == ["test-newer", "PYTHON_NEXT"]
    assert missing_files(["python", "tests/packaging/none.py", "$GITHUB_WORKSPACE/tools/none"]) == [
        "tests/packaging/none.py",
        "tools/none",
    ]


def test_the_dockerfile_copies_files_that_exist_and_are_sent():
    lines = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text()).splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert {"setup.py", "pyproject.toml", "csrc", "mft_megatron", "tools"} <= set(copied)
    assert [name for name in copied if not (ROOT / name).exists()] == []
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert [name for name in copied for pattern in ignored if fnmatch(name, pattern)] == []
