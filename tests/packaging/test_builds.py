"""A wheel and an sdist have what they need; what is missing for a build is named in one line."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.ranks import ROOT


def build(kind, source, folder):
    """Build "wheel" or "sdist" from a folder with this environment's setuptools and pybind11; return its path."""
    call = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))"
    variables = os.environ | {"MFT_CXX_FLAGS": "-O0"}  # compiles in half the time
    process = subprocess.run([sys.executable, "-c", call], cwd=source, env=variables, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return folder / process.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(source_copy, tmp_path_factory):
    return build("sdist", source_copy, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """A wheel built from the unpacked sdist and from nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    return build("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder)


def test_the_sdist_has_what_a_build_reads(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir()}
    needed |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "mft_megatron").rglob("*.py")}
    needed |= {"LICENSE", "README.md", "setup.py", "pyproject.toml", "Makefile", "constraints.txt", "pretrain_mft.py"}
    assert needed <= names
    assert not [name for name in names if name.endswith(".so")]


def test_the_wheel_has_the_extension_its_types_and_the_commands(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    ends = (sysconfig.get_config_var("EXT_SUFFIX"), ".pyi")
    compiled = {f"mft_megatron/data/{name}{end}" for name in ("_sample_index", "_mapped_files") for end in ends}
    assert {*compiled, "mft_megatron/py.typed"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    commands = {name.partition(".data/data/")[2] for name in names} - {""}
    assert commands == {"share/mft_megatron/pretrain_mft.py"} | {
        f"share/mft_megatron/tools/{path.name}" for path in (ROOT / "tools").glob("*.py")
    }
    folders = {name.partition("/")[0] for name in names}
    assert {name for name in folders if not name.endswith((".data", ".dist-info"))} == {"mft_megatron"}


def test_the_installed_wheel_packs_and_its_command_answers(environment, wheel):
    process = environment.pip("install", "--no-deps", wheel)
    assert process.returncode == 0, process.stderr
    # the other packages come from this environment; the project itself must not
    variables = {"PYTHONPATH": sysconfig.get_path("purelib"), "PYTHONSAFEPATH": "1"}
    folder = environment.python.parent.parent
    extension = environment.run(ROOT / "tests/packaging/try_extension.py", **variables)
    assert extension.returncode == 0, extension.stderr
    assert extension.stdout.startswith(str(folder))
    for command in ("pretrain_mft.py", "tools/pack_data.py"):
        help_text = environment.run(folder / "share/mft_megatron" / command, "--help", **variables)
        assert help_text.returncode == 0, help_text.stderr
        assert "--data-path" in help_text.stdout


def test_every_module_is_imported_from_the_installed_wheel(environment, wheel, source_copy, tmp_path):
    """Beside a checkout whose extension was not built, as in an environment of ``pip install .``."""
    assert environment.pip("install", "--no-deps", wheel).returncode == 0
    checkout = shutil.copytree(source_copy, tmp_path / "checkout")
    script = shutil.copytree(ROOT / "tests/packaging", checkout / "tests/packaging") / "import_every_module.py"
    assert not list(checkout.rglob("*.so"))
    variables = {"PYTHONPATH": sysconfig.get_path("purelib"), "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore"}
    process = environment.run(script, **variables)
    assert process.returncode == 0, process.stderr
    assert "modules imported" in process.stdout


def refusals(process):
    """Lines with the project's own message, of a build that failed without a traceback."""
    output = process.stdout + process.stderr
    assert process.returncode != 0
    assert "Traceback" not in output
    return [line.strip() for line in output.splitlines() if "mft_megatron cannot be built" in line]


def test_a_build_without_pybind11_says_so(environment, source_copy):
    """The environment has setuptools and no pybind11, and pip builds in it."""
    site_packages = sysconfig.get_path("purelib", vars={"base": str(environment.python.parent.parent)})
    for pattern in ("setuptools", "setuptools-*.dist-info", "_distutils_hack"):
        (folder,) = Path(sysconfig.get_path("purelib")).glob(pattern)
        shutil.copytree(folder, Path(site_packages) / folder.name)
    assert refusals(environment.pip("install", "--no-build-isolation", "--no-deps", source_copy)) == [
        "error: mft_megatron cannot be built: pybind11 is not installed; pip install 'pybind11>=2.13.6,<4', "
        "or leave out --no-build-isolation"
    ]


def build_in_place(source, folder, **variables):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    return subprocess.run(command, cwd=source, env=os.environ | variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("compiler", "problem"),
    [
        ("/nonexistent", r"there is no C\+\+ compiler /nonexistent"),
        ("false", r"the C\+\+ compiler false failed, see above"),
    ],
)
def test_a_build_without_a_compiler_says_so(source_copy, tmp_path, compiler, problem):
    (line,) = refusals(build_in_place(source_copy, tmp_path, CXX=compiler, CC=compiler))
    assert re.match(f"error: mft_megatron cannot be built: {problem}; install a C", line)


def test_an_old_setuptools_says_so(source_copy, tmp_path):
    (tmp_path / "setuptools").mkdir()
    (tmp_path / "setuptools" / "__init__.py").write_text("__version__ = '65.5.0'\n")
    assert refusals(build_in_place(source_copy, tmp_path, PYTHONPATH=str(tmp_path))) == [
        "error: mft_megatron cannot be built: setuptools 65.5.0 is too old; pip install 'setuptools>=77.0.3', or leave "
        "out --no-build-isolation"
    ]
