"""The benchmark of adapters runs, compares what it measures, and writes every number; its times are not tested."""

import json

import pytest

from tests.ranks import run_tool

TINY = "--num-layers 2 --hidden-size 128 --vocab-size 512 --segments 2 --segment-length 32 --warmup 0 --rounds 1"


def test_adapters(tmp_path):
    file = tmp_path / "numbers.json"
    process = run_tool("benchmarks/lora/adapters.py", *TINY.split(), "--json", file)
    assert process.returncode == 0, process.stderr
    results = json.loads(file.read_text())["results"]
    kinds = {"the whole model", "lora", "lora, all-linear", "qlora, all-linear", "PEFT, all-linear"}
    assert set(results) == kinds
    for name, numbers in results.items():
        assert f"| {name} |" in process.stdout
        assert numbers["milliseconds"]["cpu"] > 0
    expected = results["PEFT, all-linear"]["loss"]
    assert results["lora"]["loss"] == pytest.approx(expected, rel=1e-5)
    assert 1e-6 < abs(results["qlora, all-linear"]["loss"] / expected - 1) < 1e-2
