"""The benchmarks run, compare what they say they compare, and write every number; how long they took is not tested."""

import json

import pytest

from mft_megatron.loss_names import LOSSES
from tests.ranks import run_tool


def results(script, folder, options):
    """Run a benchmark; returns its results for each number of tasks, and its output."""
    file = folder / "numbers.json"
    process = run_tool(f"benchmarks/loss/{script}.py", *options.split(), "--json", file)
    assert process.returncode == 0, process.stderr
    written = json.loads(file.read_text())
    assert "torch" in written["machine"]
    return written["results"], process.stdout


@pytest.mark.smoke
def test_objective(tmp_path):
    found, printed = results(
        "objective", tmp_path, "--tasks 3 40 --rows 2 --seq-length 256 --mean-length 20 --repeat 2 --calls 1"
    )
    assert [result["tasks"] for result in found] == [3, 40]
    for result in found:
        assert 0 < result["tasks_present"] <= result["tasks"]
        assert set(result["variants"]) == {"plain mean", *LOSSES, "loop over tasks"}
        for name, numbers in result["variants"].items():
            assert set(numbers) == {"operators", "milliseconds", "to_plain_mean", "to_loop"}
            assert all(numbers[key][clock] > 0 for key in list(numbers)[1:] for clock in ("wall", "cpu"))
            assert f"| {name} | {numbers['operators']} |" in printed
    few, many = ({name: numbers["operators"] for name, numbers in result["variants"].items()} for result in found)
    assert few.pop("loop over tasks") < many.pop("loop over tasks")
    assert few == many  # nothing in the objective goes through tasks one by one


def test_training_step(tmp_path):
    found, printed = results(
        "training_step",
        tmp_path,
        "--tasks 3 --num-layers 1 --hidden-size 32 --vocab-size 400 --seq-length 64 --mean-length 12 --samples 60 "
        "--warmup 0 --steps 1",
    )
    (result,) = found
    assert set(result["variants"]) == {"plain mean", *LOSSES}
    for name, numbers in result["variants"].items():
        inside, step = numbers["objective_milliseconds"], numbers["step_milliseconds"]
        for clock in ("wall", "cpu"):
            assert 0 < inside[clock] < step[clock]
            assert numbers["share"][clock] == pytest.approx(inside[clock] / step[clock])
        assert f"| {name} |" in printed


def test_cross_entropy(tmp_path):
    found, printed = results(
        "cross_entropy",
        tmp_path,
        "--vocabularies 512 --tokens 96 --hidden-size 32 --precisions fp32 --supervised 0.5 --repeat 1",
    )
    (result,) = found
    assert set(result["variants"]) == {"megatron", "fused-linear", "recomputed"}
    for name, numbers in result["variants"].items():
        assert all(numbers[key][clock] > 0 for key in ("seconds", "to_megatron") for clock in ("wall", "cpu"))
        assert numbers["peak_bytes"] >= 0
        assert f"| {name} |" in printed


@pytest.mark.slow
def test_recompute(tmp_path):
    file = tmp_path / "numbers.json"
    words = "--num-layers 2 --hidden-size 64 --vocab-size 100 --seq-length 64 --segment-length 32 --rounds 1 --warmup 0"
    process = run_tool("benchmarks/recompute/layers.py", *words.split(), "--json", file)
    assert process.returncode == 0, process.stderr
    found = json.loads(file.read_text())["results"]
    assert {"all kept", "core_attn", "layernorm", "mlp", "every layer"} <= found.keys()
    for name, numbers in found.items():
        assert numbers["milliseconds"]["wall"] > 0
        assert numbers["peak_bytes"] > 0
        assert f"| {name} |" in process.stdout
