"""The benchmarks of packing and balance run and write every number; how long they took is not tested."""

import json
import sys

import numpy as np
import pytest

from tests.data.packing import mixing
from tests.ranks import run_tool

# a checkout's packer with the functions that are called: each sample is a pack
ALGORITHMS = """
def create_packing_strategy(histogram, pack_size, packing_algorithm):
    lengths = [length for length, count in enumerate(histogram) for _ in range(count)]
    return [[length] for length in lengths][:: 1 if packing_algorithm == "first_fit_shuffle" else -1], {}

def fill_packing_strategy(assignments, sequences, pack_size, pad_id):
    left = {length: list(samples) for length, samples in sequences.items()}
    taken = ([left[length].pop() for length in pack] for pack in assignments)
    return [{"input_ids": [token for sample in pack for token in sample["input_ids"]]} for pack in taken]
"""


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
    ours = [row for row in found["packing"] if row["by"] in ("ours, decreasing", "ours, mixed")]
    assert [row["samples"] for row in ours] == [500, 500, 2000, 2000]
    assert all(row["tokens"] <= 512 * row["packs"] for row in ours)
    assert all(row["left_out"] == "no --peer-python" for row in found["packing"] if row not in ours)
    assert found["opening"]["packs"] > 200
    assert set(found["opening"]["seconds"]) == {"open", "first plan", "another plan", "planned digests"}
    assert found["assembly"]["samples"] > 40
    assert "| rows |" in printed


def test_mixing(tmp_path):
    packing = tmp_path / "checkout/src/megatron/bridge/data/packing"
    packing.mkdir(parents=True)
    (packing / "algorithms.py").write_text(ALGORITHMS)
    found, printed = results(
        "mixing",
        tmp_path,
        f"--samples 2000 --seq-length 512 --global-batch-size 8 16 --epochs 2 --repeat 1 "
        f"--peer-python {sys.executable} --megatron-bridge {tmp_path / 'checkout'}",
    )
    assert len(found) == 3
    for rows in found.values():
        by_packer = {row["packer"]: row for row in rows if row.get("order") != "mixed"}
        assert all("No module named" in by_packer[name]["left_out"] for name in ("TRL, bfd", "ms-swift's binpacking"))
        ours = by_packer["ours, decreasing"]
        assert 0.9 < ours["fill"] <= 1
        alone = by_packer["Megatron-Bridge, first_fit_shuffle"]
        assert alone["rows"] == pytest.approx(2000, abs=100)
        assert alone["over_decreasing"] == alone["rows"] - ours["rows"]
        assert alone["fill"] * alone["rows"] == pytest.approx(ours["fill"] * ours["rows"])
        # a pack for each sample in random order: almost random dealing, with a fixed number of samples in each step
        for size in ("8", "16"):
            assert 0.7 < alone["spread"][size]["median"] < 1.1
        mixed = by_packer["ours, mixed"]
        assert 0 <= mixed["over_decreasing"] <= 4
        assert mixed["spread"]["8"]["largest"] < ours["spread"]["8"]["largest"]
        (ordered,) = [row for row in rows if row["packer"] == "ours, mixed" and row["order"] == "mixed"]
        assert ordered["spread"]["16"]["presence"] >= mixed["spread"]["16"]["presence"]
        assert f"| ours, decreasing | random | {ours['rows']:,} (+0) |" in printed


def test_a_packer_that_loses_a_sample_is_left_out(tmp_path):
    packing = tmp_path / "checkout/src/megatron/bridge/data/packing"
    packing.mkdir(parents=True)
    (packing / "algorithms.py").write_text(ALGORITHMS.replace("in taken]", "in taken][1:]"))
    found, printed = results(
        "mixing",
        tmp_path,
        f"--samples 500 --seq-length 512 --global-batch-size 2 --epochs 1 --repeat 1 "
        f"--peer-python {sys.executable} --megatron-bridge {tmp_path / 'checkout'}",
    )
    left_out = {row["packer"]: row["left_out"] for row in found["five tasks"] if "left_out" in row}
    name = "Megatron-Bridge, first_fit_shuffle"
    assert left_out[name] == f"{name}: not every sample is in one pack"
    assert f"| {name} | left out: {left_out[name]} |" in printed


def test_cv_of_random_dealing_is_what_dealing_gives():
    rng, steps = np.random.default_rng(1), 40
    lengths, tasks = mixing.five_tasks(3000)
    ratios = []
    for _ in range(400):
        # a step is a pack here, of the samples that went to it
        by_step = rng.integers(steps, size=len(tasks))
        packs = np.argsort(by_step), np.concatenate([[0], np.cumsum(np.bincount(by_step, minlength=steps))])
        tokens_SK = mixing.tokens_of_steps(lengths, tasks, packs, rng.permutation(steps), 1)
        assert tokens_SK.sum(0).tolist() == [lengths[tasks == task].sum() for task in range(5)]
        ratios.append(mixing.variation(tokens_SK, lengths, tasks))
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(ratios), axis=0)), 1, rtol=0.03)
