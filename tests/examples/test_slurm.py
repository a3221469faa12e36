"""The Slurm script with stand-ins for srun, scontrol and Python: it requeues after the right outcomes only."""

import os
import signal
import subprocess
import time

import pytest

from mft_megatron import exit_codes
from tests.ranks import ROOT

SCRIPT = ROOT / "examples" / "slurm" / "train.sbatch"
# what the run does: writes the code as the outcome (nothing where it is empty), and the launcher's code
SRUN = """#!/bin/bash
echo "$@" >> "$LOG"; $RUN_FIRST
[ -n "$OUTCOME" ] && { sleep 0.02; echo "$OUTCOME" > "$RUN/outcome.json"; }
exit "$RETURNS"
"""
PROGRAMS = {
    "srun": SRUN,
    "scontrol": """#!/bin/bash
[ "$1" = show ] && echo node1 && exit
echo "scontrol $@" >> "$LOG"
exit "${SCONTROL_RETURNS:-0}"
""",
    # tools/inspect_checkpoint.py DIR --outcome
    "python": '#!/bin/bash\nexit "$(cat "$2/outcome.json")"\n',
}


@pytest.fixture
def job(tmp_path):
    """A function that starts the script; returns the process and the file of what it called."""
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def start(outcome, returns=1, **variables):
        environment = {
            **{"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"), "RUN": str(tmp_path / "run")},
            **{"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "RUN_FIRST": "true"},
            **{"OUTCOME": str(outcome), "RETURNS": str(returns), **variables},
        }
        words = ["bash", str(SCRIPT), str(tmp_path / "run"), "--lr", "1"]
        return subprocess.Popen(words, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    return start


def requeued(tmp_path):
    return "scontrol requeue 7" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
@pytest.mark.parametrize("code", [0, 1, 2, 10, 11, 12, 13, 14, 15, 16])
def test_the_outcome_decides_and_not_what_the_launcher_returns(job, tmp_path, launcher, code):
    process = job(code, returns=0 if code in (0, 10) else 1, LAUNCHER=launcher)
    output = process.communicate(timeout=30)[0].decode()
    assert process.returncode == code, output
    assert requeued(tmp_path) == (code in (exit_codes.FAILED, exit_codes.LEFT, exit_codes.STALLED))
    called = (tmp_path / "log").read_text()
    assert f"pretrain_mft.py --save {tmp_path}/run --auto-resume --lr 1" in called
    assert ("--rdzv-endpoint node1:20007" in called) == (launcher == "torchrun")


@pytest.mark.parametrize(("launcher", "returns", "code"), [("srun", 2, 2), ("srun", 1, 1), ("torchrun", 1, 2)])
def test_an_outcome_of_an_earlier_start_does_not_count(job, tmp_path, launcher, returns, code):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "outcome.json").write_text("10")
    # the clock of a file system may be ahead
    os.utime(tmp_path / "run" / "outcome.json", (4e9, 4e9))
    process = job("", returns, LAUNCHER=launcher)
    process.communicate(timeout=30)
    assert (process.returncode, requeued(tmp_path)) == (code, code == 1)


def test_the_number_of_starts_is_bounded(job, tmp_path):
    process = job(1, SLURM_RESTART_COUNT="3", MAX_STARTS="3")
    assert b"after 3 starts again" in process.communicate(timeout=30)[0]
    assert (process.returncode, requeued(tmp_path)) == (1, False)


def test_a_job_that_slurm_ends_is_not_put_back(job, tmp_path):
    process = job(10, returns=0, RUN_FIRST="sleep 1")
    while not (tmp_path / "log").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert b"Slurm ends the job" in process.communicate(timeout=30)[0]
    assert (process.returncode, requeued(tmp_path)) == (10, False)


def test_each_node_has_one_torchrun_also_where_the_job_has_a_task_for_each_gpu(job, tmp_path):
    job(0, returns=0, LAUNCHER="torchrun", SLURM_NTASKS="16", SLURM_CPUS_PER_TASK="6").communicate(timeout=30)
    assert "--ntasks=2 --ntasks-per-node=1 --cpus-per-task=48 " in (tmp_path / "log").read_text()


def test_a_job_that_cannot_be_put_back_says_so(job, tmp_path):
    process = job(1, SCONTROL_RETURNS="1")
    assert b"does not put the job back" in process.communicate(timeout=30)[0]


def test_an_unknown_launcher_is_refused(job, tmp_path):
    process = job(0, LAUNCHER="mpirun")
    assert b"give srun or torchrun" in process.communicate(timeout=30)[0]
    assert process.returncode == exit_codes.BAD_INPUT
