"""Ends of runs and their next starts, through the command line: exit codes and ``outcome.json``."""

import json

import pytest

from mft_megatron import exit_codes
from mft_megatron.run_folder.outcome import read_outcome
from tests.command_lines import SMALL
from tests.ranks import ROOT, run_forked, torchrun
from tests.run_records import events, records

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
    assert "no complete checkpoint is there, so the run starts at step 0" in process.stdout
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


FAILING = """
import os, runpy, signal, sys

sys.path.insert(0, {root!r})
if __name__ == "__main__":
    from mft_megatron.mcore.trainer import Trainer

    train_step, steps = Trainer.train_step, []

    def step(self, *arguments):
        steps.append(1)
        if len(steps) == 4 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if len(steps) == 3 and "SIGNAL_LAUNCHER" in os.environ and os.environ["RANK"] == "0":
            os.kill(os.getppid(), signal.SIGTERM)
        return train_step(self, *arguments)

    Trainer.train_step = step
    sys.argv[0] = {root!r} + "/pretrain_mft.py"
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def failing(tmp_path):
    """A script that runs ``pretrain_mft.py``, of which rank 1 is killed in the fourth step of the first attempt."""
    (tmp_path / "failing.py").write_text(FAILING.format(root=str(ROOT)))
    return tmp_path / "failing.py"


@pytest.mark.slow
def test_torchrun_starts_the_ranks_again_and_they_go_on(dataset_prefix, tmp_path, failing):
    words = ["--data-path", dataset_prefix, "--save", tmp_path / "run", "--auto-resume", "--train-iters", 5]
    process = torchrun(2, "--max-restarts=1", failing, *RUN, *words, "--save-interval", 2)
    assert process.returncode == 0, process.stderr
    assert [(record["event"], record["step"]) for record in events(tmp_path / "run", "load")] == [("load", 2)]
    assert read_outcome(tmp_path / "run").name == "finished"


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_and_leaves(dataset_prefix, tmp_path, failing, monkeypatch):
    monkeypatch.setenv("SIGNAL_LAUNCHER", "1")
    words = ["--data-path", dataset_prefix, "--save", tmp_path / "run", "--auto-resume", "--train-iters", 50]
    torchrun(2, failing, *RUN, *words)
    outcome = read_outcome(tmp_path / "run")
    assert (outcome.name, outcome.reason) == ("left", "a rank got SIGTERM")
    assert (tmp_path / "run" / f"iter_{outcome.step:07}").is_dir()
