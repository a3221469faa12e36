"""The benchmarks of ``make bench-gpu`` at a tiny size, on the CPU."""

import json

import pytest

from tests.ranks import run_tool

TINY = "--model tiny --seq-length 128 --mock-data lognormal:40:0.8 uniform:5:20 --micro-batches 2 --steps 1 --warmup 1"


@pytest.mark.smoke
def test_slices(tmp_path):
    options = ("--slices", "70b, packed", "70b, padded", "--kernels", "--more", TINY, "--json", tmp_path / "found.json")
    process = run_tool("benchmarks/gpu/run.py", *options)
    assert process.returncode == 0, process.stdout + process.stderr
    packed, padded = json.loads((tmp_path / "found.json").read_text())["results"].values()
    assert (packed["data"], padded["data"]) == ("packed", "padded")
    for found in (packed, padded):
        assert found["tokens_a_second"] > 0
        assert found["layers"] == 2
        assert found["parts"]["whole step"]["wall"] >= found["parts"]["forward and backward"]["wall"] > 0
    assert "| 70b, packed | 2 |" in process.stdout


def test_a_part_that_fails_is_named():
    process = run_tool("benchmarks/gpu/run.py", "--slices", "34b, packed", "--kernels", "--more", f"{TINY} --nonsense")
    assert process.returncode == 1
    assert "benchmarks/gpu/slices.py --model 34b" in process.stdout


def test_layers_of_slices():
    from benchmarks.gpu.slices import SHAPES, layers_that_fit

    gib = 2**30
    assert layers_that_fit(SHAPES["70b"], 4096, 80 * gib) < layers_that_fit(SHAPES["70b"], 4096, 141 * gib) < 80
    assert layers_that_fit(SHAPES["34b"], 4096, 1000 * gib) == 48
