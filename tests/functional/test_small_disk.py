"""A file system that holds two checkpoints: the third cannot be written, the run goes on, and ends when it has to."""

import shutil
import subprocess
import sys

import pytest

from mft_megatron.exit_codes import STORAGE
from mft_megatron.run_folder.found import latest_checkpoint
from mft_megatron.run_folder.outcome import read_outcome
from tests.command_lines import SMALL
from tests.ranks import ROOT
from tests.run_records import records

RUN = f"{SMALL} --micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --log-interval 1 --eval-interval 9 --train-iters 7"
# in a mount namespace of its own: the file system, what ran on it, and its content afterwards
ON_SMALL_DISK = """
mount -t tmpfs -o size={size} none "$1" || exit 125
before="$2" after="$3"; disk="$1"; shift 3
cp -a "$before/." "$disk" && "$@"; code=$?
cp -a "$disk/." "$after"; exit $code
"""


def on_small_disk(size, before, after, *command):
    """Run a command with a file system of ``size`` bytes over the folder ``disk``, from one state to the next."""
    disk = after.parent / "disk"
    for folder in (disk, before, after):
        folder.mkdir(exist_ok=True)
    words = ["unshare", "-rm", "sh", "-c", ON_SMALL_DISK.format(size=size), "sh", disk, before, after]
    words += [sys.executable, *command, "--save", disk, "--load", disk]
    try:
        process = subprocess.run([str(word) for word in words], cwd=ROOT, capture_output=True, text=True, timeout=200)
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if process.returncode == 125 or "unshare failed" in process.stderr:
        pytest.skip(f"no file system can be mounted here: {process.stderr.strip()}")
    return process


@pytest.mark.slow
@pytest.mark.parametrize("background", ["", "--async-save"])
def test_a_full_file_system_ends_no_run_before_its_last_step(dataset_prefix, tmp_path, background):
    command = ["pretrain_mft.py", *RUN.split(), *background.split(), "--data-path", dataset_prefix]
    command += ["--save-interval", "2", "--tensorboard-log-interval", "9"]
    states = [tmp_path / name for name in ("empty", "full", "done")]
    ended = on_small_disk("10m", *states[:2], *command)
    assert ended.returncode == STORAGE, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    assert "; it was the last of the run" in ended.stderr
    full = states[1]
    assert latest_checkpoint(full).info.iteration == 4
    failed = [record for record in records(full, "event") if record["event"] == "save failed"]
    assert [record["step"] for record in failed] == [6, 7, 7]
    assert "the disk is full: it needs" in failed[0]["reason"]
    assert records(full, "train")[-1]["step"] == 7
    assert not list(full.glob(".*"))
    assert read_outcome(full).code == STORAGE
    # somebody makes room, and the same command finishes the run
    shutil.rmtree(full / "iter_0000002")
    finished = on_small_disk("10m", full, states[2], *command, "--keep-last", 1)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert latest_checkpoint(states[2]).info.iteration == 7
    assert len(list(states[2].glob("iter_*"))) == 1
