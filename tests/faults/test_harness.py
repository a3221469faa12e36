"""The harness itself: it tells the phases of a run apart, sees every process, and finds what is lost or doubled."""

import json
import os
import random
import subprocess
import sys

import pytest

from tests.faults import processes
from tests.faults.comparison import difference, listing, records
from tests.faults.instants import Span, choose, phase_now, spans
from tests.faults.jobs import LINE, Mark

RUN = [
    Mark(0, "launch", 0.0),
    Mark(1, "loss", 2.0),
    Mark(2, "loss", 2.5),
    Mark(2, "validation", 3.0),
    Mark(2, "save", 3.5),
    Mark(3, "loss", 4.0),
    Mark(3, "exit", 6.0),
]


def test_the_phases_of_a_run_are_told_apart():
    assert [(span.phase, span.begins, span.seconds) for span in spans(RUN, background=False)] == [
        ("start", RUN[0], 2.0),
        ("training", RUN[1], 0.5),
        ("evaluation", RUN[2], 0.5),
        ("saving", RUN[3], 0.5),
        ("training", RUN[4], 0.5),
        ("end", RUN[5], 2.0),
    ]
    late = [*RUN[:4], Mark(3, "loss", 3.4), Mark(2, "save", 3.5), Mark(3, "exit", 6.0)]
    in_background = [span for span in spans(late, background=True) if span.phase == "background saving"]
    assert in_background == [Span("background saving", RUN[3], 0.5)]
    assert phase_now(late[:5], spans(late, background=True)) == "background saving"
    assert phase_now(late[:3], spans(late, background=True)) == "evaluation"


def test_instants_are_those_that_a_resumed_run_still_has():
    of_run = spans(RUN, background=False)
    chosen = [choose(of_run, 2, random.Random(seed), ("start", "training", "saving", "end")) for seed in range(200)]
    assert {(one.phase, one.step, one.kind) for one in chosen} == {("start", 0, "launch"), ("end", 3, "loss")}
    assert {one.phase for one in (choose(of_run, 3, random.Random(s), ("training",)) for s in range(9))} == {"start"}
    delays = [one.delay for one in chosen if one.phase == "start"]
    assert min(delays) < 0.4
    assert 1.6 < max(delays) < 2.2


def test_lines_of_the_log_are_marks():
    assert LINE.match("[10:11:12] step 12 | loss 5.1 | grad norm 1").groups() == ("12", "loss")
    assert LINE.match("[10:11:12] 1 rank(s) on CPU") is None


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([{"kind": "train", "step": 1, "loss": 2.0, "step_time": 9}], []),
        ([{"kind": "train", "step": 1, "loss": 2.5}], ["metrics.jsonl:2: train 1 differs from the same before: loss"]),
        (['{"kind": "tra'], ["metrics.jsonl:2: not a record"]),
        ([{"kind": "event", "event": "load", "step": 1}], []),
    ],
)
def test_records_that_come_again_must_be_the_same(tmp_path, lines, said):
    first = {"kind": "train", "step": 1, "loss": 2.0, "step_time": 3}
    texts = [line if isinstance(line, str) else json.dumps(line) for line in (first, *lines)]
    (tmp_path / "metrics.jsonl").write_text("".join(text + "\n" for text in texts))
    found, problems = records(tmp_path)
    assert found == {"train 1": {"kind": "train", "step": 1, "loss": 2.0}}
    assert len(problems) == len(said)
    assert all(problem.startswith(one) for problem, one in zip(problems, said, strict=True))


def test_what_is_lost_or_left_behind_is_a_difference(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    assert difference(listing(tmp_path / "a"), listing(tmp_path / "b")) == ""
    (tmp_path / "b" / ".file.partial").write_text("")
    assert difference(listing(tmp_path / "a"), listing(tmp_path / "b")) == "missing [], added ['.file.partial']"
    assert difference({"x": {"y": 1}}, {"x": {}}) == "x: y is missing"
    assert difference({"x": 1.0}, {"x": 1.5}) == "x: 1.0 became 1.5"
    assert difference({}, {"x": 1}) == "x should not be there"


def test_processes_that_a_job_leaves_behind_are_seen():
    """A grandchild whose parent has ended is still below the process that adopts orphans."""
    program = (
        "import os, sys, time; from tests.faults import processes\n"
        "processes.adopt_orphans()\n"
        "if os.fork() == 0:\n"
        "    if os.fork() == 0: time.sleep(60)\n"
        "    os._exit(0)\n"
        "os.wait(); print(*processes.descendants(os.getpid()), flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        (orphan,) = map(int, parent.stdout.readline().split())
        assert processes.descendants(parent.pid) == processes.children(parent.pid) == [orphan]
        assert processes.wait_until_gone(parent.pid, 0.05)[1] == [orphan]
        processes.kill([orphan])
        assert processes.wait_until_gone(parent.pid, 10)[1] == []  # a zombie does not count
        parent.kill()
