"""The owner of a run folder through torchrun: a second start, a launcher that is killed, and the start after it."""

import os
import select
import signal
import subprocess
import sys
import time

import psutil
import pytest

from mft_megatron.exit_codes import OWNED
from mft_megatron.run_folder.names import OWNER, TRACKER
from tests.functional.test_pretrain_command import MODEL
from tests.ranks import ROOT, run_forked

RUN = (
    "--micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --lr-decay-style constant --log-interval 1 --save-interval 2 "
    "--keep-last 1 --eval-interval 1000000"
).split()


def begin(*words):
    """Start two ranks with torchrun, whose output goes through a pipe that all of their processes may hold."""
    reader, writer = os.pipe()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "pretrain_mft.py", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, stdout=writer, stderr=writer, env=environment)
    os.close(writer)
    return process, reader


def end_of(pipe, seconds):
    """Whether the pipe ends within so many seconds: no process holds it any more."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if select.select([pipe], [], [], 0.2)[0] and not os.read(pipe, 1 << 16):
            return True
    return False


def wait_for(condition, pipe, seconds=120):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        if select.select([pipe], [], [], 0.2)[0]:
            assert os.read(pipe, 1 << 16)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--async-save",)])
def test_ranks_of_a_killed_torchrun_end_and_the_next_start_goes_on(dataset_prefix, tmp_path, options):
    folder = tmp_path / "run"
    words = [*MODEL, *RUN, "--data-path", dataset_prefix, "--save", folder, "--load", folder, *options]
    first, pipe = begin(*words, "--train-iters", 1_000_000)
    try:
        wait_for((folder / TRACKER).exists, pipe)
        owned = (folder / OWNER).read_text()
        second = run_forked("pretrain_mft.py", *words, "--train-iters", 1_000_000, world_size=2)
        assert second.returncode == OWNED
        assert second.stderr.count("error: ") == 1
        assert f"--save {folder}: it is in use by training on " in second.stderr
        assert (folder / OWNER).read_text() == owned
        ranks = psutil.Process(first.pid).children(recursive=True)
        assert len(ranks) >= 2
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        assert end_of(pipe, 10)
        # a process that nobody waits for is a zombie
        assert [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE] == []
        newest = int((folder / TRACKER).read_text())
        third, third_pipe = begin(*words, "--train-iters", newest + 2)
        assert end_of(third_pipe, 120)
        os.close(third_pipe)
        assert third.wait() == 0
        assert int((folder / TRACKER).read_text()) == newest + 2
        assert not (folder / OWNER).exists()
    finally:
        first.kill()
        os.close(pipe)
