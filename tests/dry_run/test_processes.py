"""Ranks in processes of their own: order of results, errors, and a process that is killed."""

import os
import signal
import time

import pytest

from mft_megatron.dry_run.processes import RankError, run_in_processes
from mft_megatron.errors import InputError

# parents that a process was to end with
WATCHED = []


def square(rank):
    time.sleep(0.05 if rank == 1 else 0)
    return rank * rank, os.getpid()


def fail(rank):
    if rank == 2:
        raise InputError("a bad option")
    return rank


def crash(rank):
    return 1 // rank


def killed(rank):
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_are_in_order_and_of_different_processes():
    results = list(run_in_processes(square, [1, 5, 3, 2], at_once=2))
    assert [result for result, _ in results] == [1, 25, 9, 4]
    assert len({process for _, process in results} | {os.getpid()}) == 5


def test_errors_name_the_rank():
    with pytest.raises(InputError, match="rank 2: a bad option"):
        list(run_in_processes(fail, [1, 2, 3]))
    with pytest.raises(RankError, match=r"rank 0:\n(?s:.*)ZeroDivisionError"):
        list(run_in_processes(crash, [0]))


def test_a_killed_process_is_named():
    with pytest.raises(InputError, match=r"--rank 4: its process ended .*exit code -9"):
        list(run_in_processes(killed, [4]))


def parents_watched(rank):
    return WATCHED


def test_each_ends_with_the_process_that_started_it(monkeypatch):
    monkeypatch.setattr("mft_megatron.parent_process.end_with_parent", lambda: WATCHED.append(os.getppid()))
    assert list(run_in_processes(parents_watched, [0])) == [[os.getpid()]]
