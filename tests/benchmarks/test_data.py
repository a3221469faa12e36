"""The benchmarks of packing and balance run and write every number; how long they took is not tested."""

import json

import pytest

from tests.ranks import run_tool


def results(script, folder, options):
    file = folder / "numbers.json"
    process = run_tool(f"benchmarks/data/{script}.py", *options.split(), "--json", file)
    assert process.returncode == 0, process.stderr
    return json.loads(file.read_text())["results"], process.stdout


@pytest.mark.smoke
def test_balance(tmp_path):
    found, printed = results(
        "balance",
        tmp_path,
        "--samples 3000 --seq-length 512 --data-parallel 2 4 --global-batch-size 32 --batches 5 --repeat 1",
    )
    for packed, padded in zip(found["packed"], found["padded"], strict=True):
        assert 1 <= packed["by_cost"]["median"] < packed["round_robin"]["median"]
        assert padded["full_width"] < padded["round_robin"] < padded["by_cost"] <= 1
        assert f"| {packed['data_parallel']} | {packed['round_robin']['median']:.4f} (" in printed


def test_packing(tmp_path):
    found, printed = results(
        "packing",
        tmp_path,
        f"--samples 500 2000 --seq-length 512 --packs 300 --stored-samples 400 --rows 40 --repeat 1 "
        f"--folder {tmp_path}",
    )
    ours = [row for row in found["packing"] if row["by"] == "best_fit_decreasing"]
    assert [row["samples"] for row in ours] == [500, 2000]
    assert all(row["tokens"] <= 512 * row["packs"] for row in ours)
    assert all(row["left_out"] == "no --peer-python" for row in found["packing"] if row not in ours)
    assert found["opening"]["packs"] > 200
    assert set(found["opening"]["seconds"]) == {"open", "first plan", "another plan", "planned digests"}
    assert found["assembly"]["samples"] > 40
    assert "| rows |" in printed
