"""Benchmarks of reliability run and write every number; their times are not tested."""

import json

import pytest

from tests.ranks import run_tool


def test_watchdog(tmp_path):
    file = tmp_path / "numbers.json"
    words = ["--seconds", 0.3, "--micro-batches", 1, 4, "--step-seconds", 1, "--json", file]
    process = run_tool("benchmarks/reliability/watchdog.py", *words)
    assert process.returncode == 0, process.stderr
    results = json.loads(file.read_text())["results"]
    assert 0 < results["threads"] < results["of_a_step"]["1"]["1.0"] < results["of_a_step"]["4"]["1.0"]
    assert "| 4 | " in process.stdout


@pytest.mark.smoke
def test_saves(tmp_path):
    file = tmp_path / "numbers.json"
    words = ["--num-layers", 1, "--hidden-size", 32, "--vocab-size", 128, "--repeat", 1, "--folder", tmp_path]
    process = run_tool("benchmarks/reliability/saves.py", *words, "--json", file)
    assert process.returncode == 0, process.stderr
    results = json.loads(file.read_text())["results"]
    assert results["bytes"] > 10_000
    blocked, complete = (results["seconds"][f"asynchronous: {name}"][0] for name in ("blocked", "complete"))
    assert 0 < blocked < complete
    assert "| plain copy | " in process.stdout
    assert list(tmp_path.iterdir()) == [file]


def test_checks(tmp_path):
    file = tmp_path / "numbers.json"
    shape = "--num-layers 2 --hidden-size 64 --vocab-size 500 --seq-length 128 --rows 1 2 --repeat 2".split()
    process = run_tool("benchmarks/reliability/checks.py", *shape, "--folder", tmp_path, "--json", file)
    assert process.returncode == 0, process.stderr
    results = json.loads(file.read_text())["results"]
    # a weight has two states of Adam, of 4 bytes each, and is of 4 bytes, or of 2 with a main weight of 4
    of_fp32, *of_bf16 = (numbers["bytes"] for numbers in results["states"].values())
    assert len(of_bf16) == 2
    assert all(numbers == of_fp32 * 14 // 12 for numbers in of_bf16)
    assert all(f"| {precision} | " in process.stdout for precision in ("fp32", "--bf16"))
    assert [numbers["tokens"] for numbers in results["micro_batches"]] == [128, 256]
    assert all(numbers["wall"] > 0 for numbers in results["files"].values())
