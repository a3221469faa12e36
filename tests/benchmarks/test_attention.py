"""The attention benchmark runs, compares what it says, and writes every number; its times are not tested."""

import json

import pytest
import torch

from tests.ranks import run_tool

TINY = "--tokens 96 --mean-lengths 10 0 --heads 4 --groups 2 --head-size 8 --repeat 1 --precision fp32"


def results(folder, options):
    file = folder / "numbers.json"
    process = run_tool("benchmarks/attention/kernels.py", *f"{TINY} {options}".split(), "--json", file)
    assert process.returncode == 0, process.stderr
    written = json.loads(file.read_text())
    assert "torch" in written["machine"]
    return written["results"], process.stdout


@pytest.mark.parametrize(
    ("options", "variants"),
    [
        pytest.param("", {"local", "repeated keys", "explicit mask"}, marks=pytest.mark.smoke),
        ("--context-parallel-size 2", {"local"}),
    ],
)
def test_kernels(tmp_path, options, variants):
    found, printed = results(tmp_path, options)
    many, one = found
    assert many["slices"] > 4
    assert 0 < many["fraction_of_pairs"] < 0.5
    assert one["slices"] == (2 if options else 1)
    assert one["fraction_of_pairs"] == pytest.approx(1, abs=0.05)
    for result in found:
        assert set(result["variants"]) == variants
        assert set(result["why_not"]) == {"varlen", "flash", "fused"}
        for name, numbers in result["variants"].items():
            assert all(numbers[key][clock] > 0 for key in ("milliseconds", "to_local") for clock in ("wall", "cpu"))
            assert f"| {name} |" in printed
    assert "not here: flash computes in bf16 or fp16, not in fp32" in printed


def test_a_kernel_that_differs_ends_it(monkeypatch):
    import argparse
    import importlib.util

    from tests.ranks import ROOT

    spec = importlib.util.spec_from_file_location("kernels_benchmark", ROOT / "benchmarks/attention/kernels.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    options = argparse.Namespace(
        **{"tokens": 64, "seed": 1, "context_parallel_size": 1, "heads": 2, "groups": 1, "head_size": 8},
        precision="fp32",
    )
    case = benchmark.Case(options, 10)
    case.compare()
    case.variants["repeated keys"] = lambda query, key, value, spans, *others: torch.zeros_like(query) * query
    with pytest.raises(SystemExit, match="repeated keys differs from local"):
        case.compare()
