"""Benchmarks of reliability run and write every number; their times are not tested."""

import json

import pytest

from tests.ranks import run_tool


@pytest.mark.smoke
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
