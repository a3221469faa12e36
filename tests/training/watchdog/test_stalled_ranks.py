"""Ranks that hang in a collective: the watchdogs name the one that did not arrive, and end the run."""

import json
import os
import pickle
import re
import signal
import time

import pytest
import torch

from tests.made_dataset import write_dataset
from tests.parallel.run import arguments_for
from tests.ranks import ends_of_ranks

LIMIT = 1.5
# eight processes on a busy machine
START_LIMIT = 30.0
WORLD = 8


def _steps(folder, what, stopped_rank, world=WORLD, at=4):
    """Take steps of a collective each, under a watchdog; in step ``at`` something happens to one rank."""
    from pathlib import Path

    import torch
    import torch.distributed as dist

    from mft_megatron import progress_marks
    from mft_megatron.mcore.parallel import flight_recorder
    from mft_megatron.training.watchdog.limits import Limits
    from mft_megatron.training.watchdog.watchdog import watching

    rank = int(os.environ["RANK"])
    if rank == 1:
        flight_recorder.keep(os.environ)
    with watching(
        Limits(LIMIT, START_LIMIT), rank, world, Path(folder) if folder else None, lambda: f"pipeline rank {rank}"
    ):
        dist.init_process_group("gloo")
        for step in range(1, 15):
            progress_marks.mark_step(step, [2 * step, 2 * step + 1])
            progress_marks.mark("micro-batch", micro_batch=0, packs=[2 * step])
            if step == at and rank == stopped_rank:
                if folder is not None:
                    Path(folder, "when").write_text(str(time.time()))
                what()
            dist.all_reduce(torch.zeros(1))
            progress_marks.mark("optimizer")
            time.sleep(0.1)


def _raise_and_stay(folder, rank):
    """The steps, in a process that outlives its error and holds its connections, as one that waits for an export."""
    try:
        _steps(folder, _fail, rank, 3)
    except ZeroDivisionError:
        time.sleep(LIMIT + 2.5)
        raise


def _fail():
    return 1 / 0


def _stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def _stay():
    time.sleep(60)


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


def said(ends):
    """Lines on stderr that begin with ``error:``, of all ranks."""
    return [line for _, text in ends for line in text.splitlines() if line.startswith("error:")]


def test_a_stopped_rank_is_named_within_five_seconds(tmp_path):
    ends = ends_of_ranks(WORLD, _steps, str(tmp_path), _stop, 5, timeout=40)
    (line,) = said(ends)
    assert "rank 5 did not report (5: " in line
    assert "stopped by a signal" in line
    assert re.search(r"s ago it was at step \d", line)
    assert "waiting: ranks 0-4 and 6-7 at step 4, micro-batch 0 for" in line
    # the launcher would wait half a minute for a stopped process
    assert [code for code, _ in ends] == [12] * 5 + [-signal.SIGKILL] + [12] * 2
    (folder,) = (tmp_path / "stalls").iterdir()
    traces = ["nccl_trace_rank_1"] if hasattr(torch._C._distributed_c10d, "_dump_fr_trace") else []
    assert sorted(path.name for path in folder.iterdir()) == [
        *traces,
        *(f"rank_{rank:05d}.txt" for rank in range(WORLD) if rank != 5),
        "summary.txt",
    ]
    for name in traces:  # gloo's: the collective of step 4 has not ended
        entries = pickle.loads((folder / name).read_bytes())["entries"]
        assert [entry["profiling_name"] for entry in entries][-4:] == ["gloo:all_reduce"] * 4
    assert line == f"error: {(folder / 'summary.txt').read_text().strip()}"
    report = (folder / "rank_00003.txt").read_text()
    assert "rank 3: no progress for" in report
    assert "step 4, micro-batch 0, packs 8\npipeline rank 3\n" in report
    assert "packs of the step, all ranks: 8 9" in report
    assert "main thread:" in report
    assert "in all_reduce" in report
    seconds = (folder / "summary.txt").stat().st_mtime - float((tmp_path / "when").read_text())
    assert seconds < LIMIT + 5


def test_a_stopped_rank_that_has_the_store(tmp_path):
    """Rank 0 where srun or mpirun starts the ranks: reports in the run folder take the place of the notices."""
    ends = ends_of_ranks(3, _steps, str(tmp_path), _stop, 0, 3, timeout=40)
    (line,) = said(ends)
    assert "rank 0 did not report (0: " in line
    assert "stopped by a signal" in line
    assert "; waiting: ranks 1-2 at step 4, micro-batch 0 for" in line
    assert [code for code, _ in ends] == [-signal.SIGKILL, 12, 12]


def test_a_rank_that_waits_elsewhere_did_not_arrive(tmp_path):
    ends = ends_of_ranks(4, _steps, str(tmp_path), _stay, 3, 4, timeout=40)
    (line,) = said(ends)
    assert re.match(r"error: no progress for \d s: rank 3 did not arrive, step 4, micro-batch 0 for \d s \(test_", line)
    assert "; waiting: ranks 0-2 at step 4, micro-batch 0 for" in line
    assert [code for code, _ in ends] == [12] * 4


@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_rank_is_named(rank):
    """Also rank 0, with which the store of the notices ends."""
    # late enough for the ranks of a busy machine to know each other
    ends = ends_of_ranks(4, _steps, None, _kill, rank, 4, 12, timeout=40)
    lines = said(ends)
    assert lines
    for line in lines:
        # a rank that is slow to fail may find that rank 0 has ended meanwhile
        known = f"rank {rank} ended without a message, as a killed process does ({rank}: process " in line
        assert known or "have ended; one that printed no error was killed (0: process " in line
        assert f"{rank}: process " in line
    assert ends[rank][0] == -signal.SIGKILL
    assert {code for code, _ in ends} == {1, -signal.SIGKILL}


def test_a_rank_that_left_with_an_error_is_named(tmp_path):
    ends = ends_of_ranks(3, _raise_and_stay, str(tmp_path), 1, timeout=40)
    (line,) = said(ends)
    assert "rank 1 did not report (1: " in line
    assert "left with ZeroDivisionError: division by zero, " in line
    assert "ago it was at step 4, micro-batch 0); waiting: ranks 0 and 2 at step 4, micro-batch 0 for" in line
    assert [code for code, _ in ends] == [12, 1, 12]


def _run_that_saves(prefix, folder, number, minutes):
    """A run of which rank 1 gets a signal in its first save."""
    from mft_megatron.mcore.checkpointing import checkpoint
    from mft_megatron.training.pretrain import pretrain

    write = checkpoint.state_to_save

    def state_to_save(*arguments):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), number)
        return write(*arguments)

    checkpoint.state_to_save = state_to_save
    words = f"--num-layers 2 --hidden-size 32 --save {folder} --save-interval 2 --start-timeout {minutes}"
    pretrain(arguments_for(prefix, words, 2), os.environ["RANK"] == "0")


@pytest.mark.parametrize(
    ("number", "minutes"),
    [(signal.SIGKILL, 5), pytest.param(signal.SIGSTOP, 0.3, marks=pytest.mark.slow)],
    ids=["killed", "stopped"],
)
def test_a_rank_that_is_lost_in_a_save(number, minutes, tmp_path):
    write_dataset(tmp_path / "set", 128, longest=100)
    folder = tmp_path / "run"
    ends = ends_of_ranks(2, _run_that_saves, str(tmp_path / "set"), str(folder), number, minutes, timeout=45)
    (line,) = said(ends)
    assert ends[1][0] == -signal.SIGKILL
    assert not (folder / "latest_checkpointed_iteration.txt").exists()
    if number == signal.SIGKILL:
        assert "rank 1 ended without a message, as a killed process does (1: process " in line
        assert ends[0][0] == 1
    else:
        assert "rank 1 did not report (1: " in line
        assert "stopped by a signal" in line
        assert "; waiting: rank 0 at step 2, save, checkpoint 2 for" in line
        assert ends[0][0] == 12
        outcome = json.loads((folder / "outcome.json").read_text())
        assert (outcome["name"], outcome["step"]) == ("stalled", 1)
