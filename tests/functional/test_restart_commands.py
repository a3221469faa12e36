"""Ends of runs and their next starts, through the command line: exit codes and ``outcome.json``."""

import json

from mft_megatron import exit_codes
from mft_megatron.run_folder.outcome import read_outcome
from tests.command_lines import SMALL
from tests.ranks import run_forked
from tests.run_records import records

RUN = f"{SMALL} --micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --log-interval 1 --eval-interval 2".split()


def run(prefix, folder, *words, **options):
    """Run ``pretrain_mft.py`` with these options; returns the process and the outcome."""
    command = ["pretrain_mft.py", *RUN, "--data-path", prefix, "--save", folder, *words]
    process = run_forked(*command, **options)
    found = read_outcome(folder)
    return process, None if found is None else (found.code, found.step, found.reason)


def test_each_end_of_a_run_has_its_code_and_its_outcome(dataset_prefix, tmp_path):
    folder = tmp_path / "run"
    continued = ["--load", folder, "--train-iters", 3]
    process, outcome = run(dataset_prefix, folder, *continued, "--exit-interval", 2)
    assert (process.returncode, *outcome) == (exit_codes.LEFT, exit_codes.LEFT, 2, "--exit-interval 2"), process.stderr
    process, outcome = run(dataset_prefix, folder, *continued, "--seed", 7)
    assert (process.returncode, outcome[0]) == (exit_codes.BAD_INPUT, exit_codes.BAD_INPUT), process.stderr
    assert outcome[2].startswith("--seed 7: the checkpoint ")
    for _ in range(2):
        process, outcome = run(dataset_prefix, folder, *continued)
        assert (process.returncode, *outcome) == (0, 0, 3, "the run is complete"), process.stderr
    assert [record["step"] for record in records(folder, "train")] == [1, 2, 3]


def test_a_run_that_gets_no_further_is_not_started_again(dataset_prefix, tmp_path):
    words = ["--auto-resume", "--train-iters", 2]
    process, _ = run(dataset_prefix, tmp_path, *words, "--exit-interval", 1)
    assert process.returncode == exit_codes.LEFT, process.stderr
    (start,) = json.loads((tmp_path / "starts.json").read_text())
    failed = {**start, "code": exit_codes.FAILED, "reason": "a fault", "reached": 1, "last_seen": start["time"]}
    (tmp_path / "starts.json").write_text(json.dumps([failed] * 3 + [start]))
    process, outcome = run(dataset_prefix, tmp_path, *words)
    assert (process.returncode, outcome[0]) == (exit_codes.NO_PROGRESS, exit_codes.NO_PROGRESS), process.stderr
    assert "2 starts in a row completed no new step" in process.stderr
    assert not (tmp_path / "iter_0000002").exists()
    (tmp_path / "starts.json").unlink()
    process, outcome = run(dataset_prefix, tmp_path, *words)
    assert (process.returncode, *outcome[:2]) == (0, 0, 2), process.stderr
