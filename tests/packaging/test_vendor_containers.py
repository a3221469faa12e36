"""Installing the project keeps the torch, Transformer Engine and flash-attn of a vendor's container.

Stand-in wheels of the vendor's builds are installed, then pip resolves the project's own metadata against an index of
stand-ins that has newer releases of everything.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from tests.packaging.wheels import write_wheel, write_wheel_of
from tests.ranks import ROOT

CONTAINER = {"transformer-engine": "2.10.0+769ed77", "flash-attn": "2.7.4.post1+25.12", "numpy": "1.26.4"}
INDEX = {
    "torch": ("2.6.0", "2.13.0", "2.14.1", "2.15.0"),
    "flash-attn": ("2.7.3", "2.8.3"),
    "numpy": ("1.26.0", "2.4.6"),
    "orjson": ("3.11.0", "99.0"),
    "transformer-engine-torch": ("2.11.0",),
}
MEGATRON_CORE = ("0.16.1", "0.19.2", "0.20.0rc1", "0.20.0")


@pytest.fixture(scope="module")
def metadata(source_copy, tmp_path_factory):
    """The project's METADATA, as its build makes it."""
    folder = tmp_path_factory.mktemp("metadata")
    build = f"from setuptools import build_meta; print(build_meta.prepare_metadata_for_build_wheel({str(folder)!r}))"
    process = subprocess.run([sys.executable, "-c", build], cwd=source_copy, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return (folder / process.stdout.split()[-1] / "METADATA").read_text()


def fill_index(folder, metadata):
    """Write a wheel of the project, and one of each release that pip may choose."""
    version = re.search(r"^Version: (.*)$", metadata, re.MULTILINE)[1]
    write_wheel_of(folder, "mft-megatron", version, metadata)
    for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE):
        requirement = Requirement(line)
        if requirement.name not in {*INDEX, "megatron-core", "transformer-engine"} and not requirement.marker:
            write_wheel(folder, requirement.name, "5.99" if requirement.name == "transformers" else "99.0")
    for name, versions in INDEX.items():
        for version in versions:
            write_wheel(folder, name, version)
    for version in MEGATRON_CORE:
        write_wheel(folder, "megatron-core", version, ["torch>=2.6.0", "numpy", "packaging>=24.2"])
    write_wheel(
        folder, "transformer-engine", "2.11.0", ["transformer-engine-torch==2.11.0; extra == 'pytorch'"], ["pytorch"]
    )


def vendor_container(environment, wheels, torch):
    """Install stand-ins of what such a container has."""
    vendor = wheels.parent / "vendor"
    vendor.mkdir()
    for name, version in {"torch": torch, **CONTAINER}.items():
        write_wheel(vendor, name, version, ["torch"] if name != "torch" and name != "numpy" else [])
    process = environment.pip("install", "--no-deps", *vendor.iterdir())
    assert process.returncode == 0, process.stderr
    return environment.versions()


def chosen(process, report):
    """Version of everything that pip would install, by name."""
    assert process.returncode == 0, process.stderr
    entries = json.loads(report.read_text())["install"]
    return {entry["metadata"]["name"]: entry["metadata"]["version"] for entry in entries}


@pytest.mark.parametrize("torch", ["2.7.0a0+6c54963f75.nv25.2", "2.10.0a0+b4e4ee8.nv25.12", "2.14.0a0+0123abc.nv26.9"])
def test_the_vendors_builds_are_kept(environment, tmp_path, metadata, torch):
    fill_index(tmp_path / "wheels", metadata)
    before = vendor_container(environment, tmp_path / "wheels", torch)
    report = tmp_path / "report.json"
    for project in ("mft-megatron", "mft-megatron[gpu]"):
        installed = chosen(environment.pip("install", "--dry-run", "--report", report, project), report)
        assert installed["megatron-core"] == "0.19.2"  # neither 0.20 nor a pre-release of it
        assert not set(installed) & {*before, "transformer-engine-torch"}


def test_an_upper_bound_on_torch_replaces_the_vendors(environment, tmp_path, metadata):
    old = metadata.replace("Requires-Dist: torch>=2.6\n", "Requires-Dist: torch<2.14,>=2.13\n")
    assert old != metadata
    fill_index(tmp_path / "wheels", old)
    vendor_container(environment, tmp_path / "wheels", "2.10.0a0+b4e4ee8.nv25.12")
    report = tmp_path / "report.json"
    installed = chosen(environment.pip("install", "--dry-run", "--report", report, "mft-megatron"), report)
    assert installed["torch"] == "2.13.0"


def kept_command():
    """The command of the Dockerfile that lists what must be kept, as docs/INSTALL.md shows it."""
    document = (ROOT / "docs/INSTALL.md").read_text()
    command = re.search(r"^pip list --format=freeze \| grep -iE '[^']+'", document, re.MULTILINE)[0]
    assert (ROOT / "Dockerfile").read_text().count(command) == 2
    return command


def constraints_of(environment, folder):
    """Run :func:`kept_command` for an environment."""
    (folder / "bin").mkdir()
    pip = folder / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pip --python "{environment.python}" "$@"\n')
    pip.chmod(0o755)
    variables = os.environ | {"PATH": f"{pip.parent}:{os.environ['PATH']}"}
    (folder / "kept.txt").write_text(
        subprocess.run(["sh", "-c", kept_command()], env=variables, capture_output=True, text=True, check=True).stdout
    )
    return folder / "kept.txt"


def test_pip_refuses_a_vendors_torch_that_is_too_old_if_it_must_stay(environment, tmp_path, metadata):
    """Megatron-Core's own bound excludes 2.6.0a0: pip alone would replace it."""
    fill_index(tmp_path / "wheels", metadata)
    before = vendor_container(environment, tmp_path / "wheels", "2.6.0a0+df5bbc09d1.nv24.12")
    report = tmp_path / "report.json"
    assert "torch" in chosen(environment.pip("install", "--dry-run", "--report", report, "mft-megatron"), report)
    kept = constraints_of(environment, tmp_path)
    assert kept.read_text().splitlines() == [
        f"{name}=={version}" for name, version in sorted(before.items()) if name != "numpy"
    ]
    process = environment.pip("install", "-c", kept, "mft-megatron")
    assert process.returncode != 0
    assert "The user requested (constraint) torch==2.6.0a0+df5bbc09d1.nv24.12" in process.stdout
    assert environment.versions() == before


@pytest.mark.parametrize(("pins", "orjson"), [(None, "99.0"), ("numpy==1.26.4\norjson==3.11.0\n", "3.11.0")])
def test_constraints_of_the_container_install_everything_else(environment, tmp_path, metadata, pins, orjson):
    """Containers that set PIP_CONSTRAINT keep what it pins as well."""
    fill_index(tmp_path / "wheels", metadata)
    before = vendor_container(environment, tmp_path / "wheels", "2.10.0a0+b4e4ee8.nv25.12")
    kept = constraints_of(environment, tmp_path)
    process = environment.pip("install", "-c", kept, "mft-megatron[gpu]", **pip_constraint(tmp_path, pins))
    assert process.returncode == 0, process.stderr
    after = environment.versions()
    assert before.items() < after.items()
    assert after["megatron-core"] == "0.19.2"
    assert after["orjson"] == orjson
    assert environment.pip("check").returncode == 0


def pip_constraint(folder, pins):
    """Environment variables of a container with these pins, ``None`` if it has none."""
    if pins is None:
        return {}
    (folder / "vendor.txt").write_text(pins)
    return {"PIP_CONSTRAINT": str(folder / "vendor.txt")}


def test_a_pin_of_the_container_outside_the_bounds_is_refused(environment, tmp_path, metadata):
    """pip names the pin and changes nothing; without that line it installs."""
    fill_index(tmp_path / "wheels", metadata)
    write_wheel(tmp_path / "wheels", "orjson", "3.9.15")
    before = vendor_container(environment, tmp_path / "wheels", "2.10.0a0+b4e4ee8.nv25.12")
    command = ("install", "-c", constraints_of(environment, tmp_path), "mft-megatron")
    process = environment.pip(*command, **pip_constraint(tmp_path, "numpy==1.26.4\norjson==3.9.15\n"))
    assert process.returncode != 0
    assert "The user requested (constraint) orjson==3.9.15" in process.stdout
    assert environment.versions() == before
    assert environment.pip(*command, **pip_constraint(tmp_path, "numpy==1.26.4\n")).returncode == 0
