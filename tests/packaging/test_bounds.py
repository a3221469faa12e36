"""Bounds, pins and the Pythons that are named agree everywhere."""

import ast
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mft_megatron.mcore.platform import optional_packages, versions
from tests.packaging.project import pins, pyproject, requirements
from tests.ranks import ROOT

PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def lower_bounds(lines):
    return {
        name: Version(specifier.version)
        for name, requirement in requirements(lines).items()
        for specifier in requirement.specifier
        if specifier.operator == ">="
    }


def test_each_lower_bound_is_a_pin_of_the_oldest_environment():
    required = [*pyproject()["project"]["dependencies"], *pyproject()["build-system"]["requires"]]
    bounds = lower_bounds(required)
    assert set(bounds) == set(requirements(required))
    pinned = pins("constraints-oldest.txt", "3.10")
    assert {name: Version(pinned[name]) for name in bounds} == bounds


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_are_within_the_bounds(python):
    required = [*pyproject()["project"]["dependencies"], *pyproject()["build-system"]["requires"]]
    optional = pyproject()["project"]["optional-dependencies"]
    required += [*optional["test"], *optional["dev"], *optional["qlora"], *optional["tracking"]]
    pinned = pins("constraints.txt", python)
    for name, requirement in requirements(required).items():
        if name != "mft-megatron":
            assert pinned[name] in requirement.specifier, (requirement, pinned[name])


def test_the_supported_pythons_are_the_same_everywhere():
    project = pyproject()["project"]
    admitted = SpecifierSet(project["requires-python"])
    assert [f"3.{minor}" for minor in range(30) if f"3.{minor}.1" in admitted] == list(PYTHONS)
    named = [line.rpartition(" ")[2] for line in project["classifiers"] if "Python :: 3." in line]
    assert named == list(PYTHONS)
    assert pyproject()["tool"]["cibuildwheel"]["build"].split() == [
        f"cp{python.replace('.', '')}-manylinux_*" for python in PYTHONS
    ]
    for path in ("README.md", "Makefile", "docs/INSTALL.md"):
        assert "Python 3.10-3.13" in (ROOT / path).read_text().replace("–", "-")


def test_torch_has_no_upper_bound_and_megatron_core_admits_no_pre_release_of_the_next():
    required = requirements(pyproject()["project"]["dependencies"])
    assert str(required["torch"].specifier) == ">=2.6"
    for version, admitted in {"0.16.1": 1, "0.19.2": 1, "0.16.0": 0, "0.20.0rc1": 0, "0.20.0.dev0": 0}.items():
        assert required["megatron-core"].specifier.contains(version, prereleases=True) == bool(admitted)


def test_messages_about_optional_packages_have_the_bounds_of_the_extras():
    extras = pyproject()["project"]["optional-dependencies"]
    lines = {name: line for extra in ("gpu", "qlora") for name, line in requirements(extras[extra]).items()}
    for package in (
        optional_packages.FLASH_ATTN,
        optional_packages.TRANSFORMER_ENGINE,
        optional_packages.BITSANDBYTES,
    ):
        said = Requirement(re.search(r"'(.*)'", package.install)[1])
        assert said.specifier == lines[package.name].specifier
        assert said.extras == lines[package.name].extras
        assert Version(package.least) == min(Version(part.version) for part in said.specifier)


def test_the_table_of_versions_in_the_documents_has_the_pins():
    document = (ROOT / "docs/INSTALL.md").read_text()
    for name, title in {"torch": "torch", "megatron-core": "Megatron-Core"}.items():
        (row,) = re.findall(rf"^\| {title} \|.*$", document, re.MULTILINE)
        newest, oldest = [cell.strip() for cell in row.split("|")][3:5]
        pinned = {pins("constraints.txt", python)[name] for python in PYTHONS}
        assert pinned == set(re.findall(r"\d+\.\d+\.\d+", newest))
        assert oldest == pins("constraints-oldest.txt", "3.10")[name]


def pinned_torch(constraints):
    """Run the Makefile's script that chooses torch."""
    (script,) = re.findall(
        r"^define PINNED_TORCH\n(.*?)^endef", (ROOT / "Makefile").read_text(), re.DOTALL | re.MULTILINE
    )
    return subprocess.run([sys.executable, "-c", script, constraints], capture_output=True, text=True)


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-oldest.txt"])
def test_make_installs_the_pinned_torch(constraints):
    process = pinned_torch(ROOT / constraints)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == [pins(constraints, "{}.{}".format(*sys.version_info))["torch"]]


@pytest.mark.parametrize("lines", ["", "numpy==2.4.6\n", "torch==2.6.0 ; python_version < '3'\n"])
def test_make_refuses_constraints_without_a_pin_of_torch(tmp_path, lines):
    (tmp_path / "pins.txt").write_text(lines)
    process = pinned_torch(tmp_path / "pins.txt")
    assert process.returncode != 0
    assert process.stdout == ""
    assert re.fullmatch(r"error: \S+pins\.txt has no line torch==\.\.\. for Python 3\.\d+; add one\n", process.stderr)


def test_bounds_and_pins_are_in_the_table_of_releases_that_work():
    required = requirements(pyproject()["project"]["dependencies"])
    (others,) = re.findall(r"^OTHER_MEGATRON_CORE = (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    used = {"torch": set(), "megatron-core": set(others.split())}
    for known in (versions.TORCH, versions.MEGATRON_CORE):
        name = known.name.lower()
        assert Requirement(known.install) == required[name]
        used[name] |= {pins("constraints.txt", python)[name] for python in PYTHONS}
        used[name].add(pins("constraints-oldest.txt", "3.10")[name])
        releases = {Version(version).release for version in used[name]}
        assert min(releases)[: len(known.oldest)] == known.oldest
        assert max(releases)[:2] == known.newest


def test_setup_names_the_build_requirements():
    required = {str(requirement) for requirement in requirements(pyproject()["build-system"]["requires"]).values()}
    said = re.findall(r"pip install '([^']+)'", (ROOT / "setup.py").read_text())
    assert {str(Requirement(line)) for line in said} == required
    assert "torch" not in {
        alias.name
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
