"""Triton kernels: their results by Triton's interpreter, and their registers when they are compiled for A100 and H100.

No GPU is needed. `make test-kernels` installs Triton; a CUDA build of torch brings it.
"""

import functools
import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
from packaging.version import Version

from tests.ranks import ROOT

try:
    TRITON = Version(importlib.metadata.version("triton"))
except importlib.metadata.PackageNotFoundError:
    pytest.skip("Triton is not installed; `make test-kernels` installs it", allow_module_level=True)


def run(module, *words, **environment):
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.mcore.kernels.{module}", *words],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@functools.cache
def interpreted():
    return run("interpreted", TRITON_INTERPRET="1")


# a norm of six elements loses most
@pytest.mark.parametrize(("kernel", "most"), [("rotary", 2), ("norm", 5)])
def test_against_fp64(kernel, most):
    errors = {name: error for name, error in interpreted().items() if name.startswith(kernel)}
    assert len(errors) > 20
    assert {name: error for name, error in errors.items() if not error < most} == {}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    if Version("3.3") > TRITON:
        pytest.skip("compiling ahead of time was called otherwise before Triton 3.3")
    return run("compiled", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("kernels")))


# those of a token's heads, and of the programs' sums; norms of 128 elements have several rows in a program
@pytest.mark.parametrize(("kernel", "most"), [("rotary", 1), ("norm forward 128", 0), ("norm backward 128", 2)])
def test_rows_are_found_by_64_bits(compiled, kernel, most):
    """A micro-batch of 2³¹ elements, as 262,144 tokens of 8,192, overflows offsets of 32 bits."""
    narrow = {name: use["narrow"] for name, use in compiled.items() if name.startswith(kernel)}
    assert len(narrow) >= 4
    assert max(narrow.values()) <= most


def test_compiled_ahead_of_time_nothing_is_spilled(compiled):
    """A thread has 255 registers; what is spilled goes to memory, which these kernels are bound by."""
    kernels = compiled
    for name, use in kernels.items():
        print(f"{name}: {use['registers']} registers, {use['spilled']} bytes spilled")
    assert {name.rpartition(" ")[2] for name in kernels} == {"sm_80", "sm_90"}
    assert {name: use for name, use in kernels.items() if use["spilled"] or use["registers"] > 128} == {}
