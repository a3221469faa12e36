"""The benchmarks of ``make bench-gpu`` at a tiny size, on the CPU."""

import json

import pytest

from tests.ranks import run_tool

TINY = "--model tiny --seq-length 128 --mock-data lognormal:40:0.8 uniform:5:20 --micro-batches 2 --steps 1 --warmup 1"


@pytest.mark.smoke
@pytest.mark.parametrize("data", ["packed", pytest.param("padded", marks=pytest.mark.slow)])
def test_slices(tmp_path, data):
    options = ("--slices", f"70b, {data}", "--kernels", "--more", TINY, "--json", tmp_path / "found.json")
    process = run_tool("benchmarks/gpu/run.py", *options)
    assert process.returncode == 0, process.stdout + process.stderr
    (found,) = json.loads((tmp_path / "found.json").read_text())["results"].values()
    assert found["data"] == data
    assert found["tokens_a_second"] > 0
    assert found["layers"] == 2
    assert found["parts"]["whole step"]["wall"] >= found["parts"]["forward and backward"]["wall"] > 0
    assert f"| 70b, {data} | 2 |" in process.stdout


def test_a_part_that_fails_is_named():
    process = run_tool("benchmarks/gpu/run.py", "--slices", "34b, packed", "--kernels", "--more", f"{TINY} --nonsense")
    assert process.returncode == 1
    assert "benchmarks/gpu/slices.py --model 34b" in process.stdout


def test_layers_of_slices():
    from benchmarks.gpu.slices import SHAPES, layers_that_fit

    gib = 2**30
    assert layers_that_fit(SHAPES["70b"], 4096, 80 * gib) < layers_that_fit(SHAPES["70b"], 4096, 141 * gib) < 80
    assert layers_that_fit(SHAPES["34b"], 4096, 1000 * gib) == 48
