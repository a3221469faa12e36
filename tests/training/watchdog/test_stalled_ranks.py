"""Ranks that hang in a collective: the watchdogs name the one that did not arrive, and end the run."""

import os
import pickle
import re
import signal
import time

import pytest
import torch

from tests.ranks import ends_of_ranks

LIMIT = 1.0
WORLD = 8


def _steps(folder, what, stopped_rank, world=WORLD):
    """Take steps of a collective each, under a watchdog; in step 4 something happens to one rank."""
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
    with watching(Limits(LIMIT, LIMIT), rank, world, Path(folder) if folder else None, lambda: f"pipeline rank {rank}"):
        dist.init_process_group("gloo")
        for step in range(1, 10):
            progress_marks.mark_step(step, [2 * step, 2 * step + 1])
            progress_marks.mark("micro-batch", micro_batch=0, packs=[2 * step])
            if step == 4 and rank == stopped_rank:
                if folder is not None:
                    Path(folder, "when").write_text(str(time.time()))
                what()
            dist.all_reduce(torch.zeros(1))
            progress_marks.mark("optimizer")
            time.sleep(0.1)


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
    ends = ends_of_ranks(WORLD, _steps, str(tmp_path), _stay, 3, timeout=40)
    (line,) = said(ends)
    assert re.match(r"error: no progress for \d s: rank 3 did not arrive, step 4, micro-batch 0 for \d s \(test_", line)
    assert "; waiting: ranks 0-2 and 4-7 at step 4, micro-batch 0 for" in line
    assert [code for code, _ in ends] == [12] * WORLD


@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_rank_is_named(rank):
    """Also rank 0, with which the store of the notices ends."""
    ends = ends_of_ranks(4, _steps, None, _kill, rank, 4, timeout=40)
    lines = said(ends)
    assert len(lines) == 1 or rank == 0
    for line in lines:
        assert f"rank {rank} ended without a message, as a killed process does ({rank}: process " in line
    assert ends[rank][0] == -signal.SIGKILL
    assert {code for code, _ in ends} == {1, -signal.SIGKILL}
