"""The pure parts of the watchdog: limits by phase, places in words, and the line about a stalled run."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from mft_megatron import progress_marks
from mft_megatron.progress_marks import Mark, Position
from mft_megatron.training.watchdog import process_state, reports
from mft_megatron.training.watchdog.errands import Errands
from mft_megatron.training.watchdog.limits import Limits
from mft_megatron.training.watchdog.notice import LEFT, RUNNING, STALLED, Notice, packs_of, place_of, ranks_text
from mft_megatron.training.watchdog.stacks import main_line, stacks
from mft_megatron.training.watchdog.verdict import verdict


def at(phase, step=5, first_step=False, packs=(), **where):
    return Position(Mark(phase, 0.0, where), step, packs, first_step)


@pytest.mark.parametrize(
    ("position", "seconds"),
    [
        (at("start", step=None), 60),
        (at("micro-batch", step=None), 60),
        (at("micro-batch", first_step=True), 60),
        (at("micro-batch"), 10),
        (at("evaluation"), 10),
        (at("save"), 60),
        (at("save in the background"), 60),
        (at("load"), 60),
        (at("an unknown phase"), 10),
    ],
)
def test_limits_by_phase(position, seconds):
    assert Limits(10, 60).of(position) == seconds


def test_the_shortest_limit_leaves_out_those_that_are_off():
    assert [Limits(*pair).shortest for pair in ((10, 60), (0, 60), (10, 0), (0, 0))] == [10, 60, 10, 0]


@pytest.mark.parametrize(
    ("position", "text", "packs"),
    [
        (at("start", step=None), "start", []),
        (at("optimizer", packs=np.array([4, 2, -1])), "step 5, optimizer", [4, 2]),
        (at("read", micro_batch=2, split="train", packs=np.array([7, -1])), "step 5, read micro-batch 2", [7]),
        (at("micro-batch", micro_batch=0, split="valid"), "step 5, micro-batch 0 of the valid split", []),
        (at("save", checkpoint=40), "step 5, save, checkpoint 40", []),
    ],
)
def test_places_in_words(position, text, packs):
    assert place_of(position) == text
    assert packs_of(position) == packs


def test_ranks_in_words():
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([7, 1, 0, 2, 4]) == "ranks 0-2, 4 and 7"


def notice(rank, place="step 5, optimizer", idle=60.0, state=STALLED, also="a.py:1 f", waits=True):
    return Notice(rank, "node", 100 + rank, 0, state, place, idle, 1000.0, also, waits)


def judged(*notices, world=4, states=None):
    return verdict({one.rank: one for one in notices}, world, 1030.0, states or {})


def test_a_rank_that_does_not_report_did_not_arrive():
    stopped = notice(2, "step 5, micro-batch 1", state=RUNNING)
    assert judged(notice(0), notice(1), stopped, notice(3), states={2: "gone"}) == (
        "rank 2 did not report (2: node, process 102, gone, 30 s ago it was at step 5, micro-batch 1); waiting: ranks "
        "0-1 and 3 at step 5, optimizer for 60 s (a.py:1 f)"
    )


def test_ranks_that_were_never_heard_of_and_left():
    left = notice(0, state=LEFT, also="ValueError: no")
    text = judged(left, notice(3))
    assert text.startswith("ranks 0-2 did not report (0: node, process 100, left with ValueError: no, 30 s ago")
    assert "; 1: never heard of; 2: never heard of); waiting: rank 3 at" in text


def test_many_silent_ranks_are_counted():
    assert "; 507 more)" in judged(notice(0), world=512)


def test_a_rank_that_waits_for_nobody_did_not_arrive():
    """Though another one waits longer, for it."""
    reading = notice(1, "step 5, read micro-batch 0", 50.0, also="data.py:9 read", waits=False)
    text = judged(notice(0), reading, notice(2), notice(3))
    assert text == (
        "rank 1 did not arrive, step 5, read micro-batch 0 for 50 s (data.py:9 read); waiting: ranks 0 and 2-3 at step "
        "5, optimizer for 60 s (a.py:1 f)"
    )


def test_one_of_many_that_wait_for_the_device():
    """On a GPU ranks wait in ``.item()``, which says nothing: the place with fewest ranks is the one."""
    others = [notice(rank, idle=60.0, waits=False) for rank in range(3)]
    assert judged(*others, notice(3, "step 5, read micro-batch 0", 59.9, waits=False)).startswith("rank 3 did not")


def test_where_all_wait_the_first_that_stopped_did_not_arrive():
    text = judged(notice(0), notice(1), notice(2), notice(3, "step 5, micro-batch 3", 61.0))
    assert text.startswith("rank 3 did not arrive, step 5, micro-batch 3 for 61 s")


def test_all_at_one_place():
    same = [notice(rank) for rank in range(4)]
    assert judged(*same) == "all ranks are at the same place: step 5, optimizer for 60 s (a.py:1 f)"
    assert judged(same[0], world=1) == "step 5, optimizer for 60 s (a.py:1 f)"


def test_an_errand_that_hangs_costs_its_patience_once():
    errands, hang = Errands("test"), threading.Event()
    assert errands.run(lambda: 3, 5) == 3
    assert errands.run(lambda: 1 / 0, 5) is None
    assert isinstance(errands.error, ZeroDivisionError)
    before = time.monotonic()
    assert errands.run(hang.wait, 0.2) is None
    for _ in range(20):
        assert errands.run(lambda: 4, 1) is None
    assert time.monotonic() - before < 1
    hang.set()
    while (result := errands.run(lambda: 5, 1)) is None:
        time.sleep(0.01)
    assert result == 5
    errands.close(5)
    assert not errands._thread.is_alive()


def test_reports_of_a_stall_share_a_folder_for_a_minute(tmp_path):
    name = reports.folder_name(tmp_path)
    folder = tmp_path / "stalls" / name
    reports.write_report(folder, 3, "the text", notice(3).as_text())
    assert reports.folder_name(tmp_path) == name
    assert Notice.from_text(reports.reported(folder)[3]) == notice(3)
    assert (folder / "rank_00003.txt").read_text().startswith("the text\n")
    assert [reports.claim_summary(folder), reports.claim_summary(folder)] == [True, False]
    old = time.time() - 100
    os.rename(folder, folder.with_name("2001-01-01T00-00-00Z"))
    os.utime(folder.with_name("2001-01-01T00-00-00Z"), (old, old))
    assert not reports.folder_name(tmp_path).startswith("2001")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells the state of processes")
def test_states_of_processes():
    process = subprocess.Popen(["sleep", "60"])
    born = process_state.born(process.pid)
    assert process_state.state_of(process.pid, born) is None
    process.send_signal(19)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    assert process_state.state_of(process.pid, born) == process_state.STOPPED
    assert process_state.state_of(process.pid, born + 1) == process_state.GONE  # another process of this id
    process.kill()
    process.wait()
    assert process_state.state_of(process.pid, born) == process_state.GONE
    assert process_state.state_of(process.pid, 0) is None


def test_stacks_of_other_threads():
    """The report is made in the watchdog's thread: it shows the main thread first, and where that is in the project."""
    found = []

    def look():
        progress_marks.position()
        found.extend([stacks(), main_line()])

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    text, (line, waits) = found
    assert text.startswith("main thread:\n")
    assert "test_stacks_of_other_threads" in text
    assert "in look" not in text
    assert line.startswith("threading.py:")
    assert not waits
