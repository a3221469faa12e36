"""A run that is started again and again and gets no further is stopped; one that had bad luck is not."""

import dataclasses
import datetime
import json

import pytest

from mft_megatron import exit_codes
from mft_megatron.errors import InputError
from mft_megatron.run_folder.outcome import LOST_RANK, read_outcome, record_outcome, record_running
from mft_megatron.run_folder.starts import RunStart, begin_start, without_progress

FAILED, LEFT = exit_codes.FAILED, exit_codes.LEFT


def starts(words):
    """Starts in words: code (k: killed, l: lost a rank, K: killed after long) and completed steps, as in "1:1003"."""
    found = []
    for number, word in enumerate(words.split()):
        code, reached = word.split(":")
        reason = LOST_RANK if code == "l" else "a fault"
        minutes = 11 if code == "K" else 1
        found.append(
            RunStart(
                *(f"start {number}", "2026-01-01T00:00:00Z", 1000, "options"),
                code={"k": None, "K": None, "l": FAILED}.get(code, int(code) if code.isdecimal() else None),
                reason=reason,
                reached=int(reached),
                last_seen=f"2026-01-01T00:{minutes:02}:00Z",
            )
        )
    return found


@pytest.mark.parametrize(
    ("words", "stopped"),
    [
        ("", 0),
        ("1:1003", 0),
        ("1:1003 1:1003", 0),
        ("1:1003 1:1003 1:1003", 2),
        ("1:1003 1:1002 1:1001", 2),  # never further, wherever it fails
        ("1:1003 1:1003 1:1004", 0),
        ("1:1003 1:1003 1:1004 1:1004", 0),
        ("1:1003 11:1003 12:1003", 2),  # diverged, stalled
        ("1:1003 13:1000 13:1000", 2),  # damaged
        ("1:1003 10:1003 10:1003 10:1003", 0),  # left on request
        ("1:1003 2:1000 2:1000 15:1003 15:1003 130:1003", 0),  # refused, full disk, Ctrl-C
        ("1:1003 1:1003 2:1000 1:1003", 2),  # they do not make up for it either
        ("1:1003 1:1003 10:1009 1:1003", 0),
        ("k:1003" + " k:1003" * 9, 0),
        ("k:1003" + " k:1003" * 10, 10),
        ("k:1003" + " l:1003" * 5 + " k:1000" * 5, 10),
        ("k:1003 K:1003 K:1001", 2),
        ("k:1003 K:1003 k:1001 l:1001 1:1003", 2),
        ("k:1000" + " k:1000" * 9 + " k:1001", 0),
    ],
)
def test_which_starts_count(words, stopped):
    assert len(without_progress(starts(words), "options")) == stopped


def test_other_options_count_anew():
    first, second, third = starts("1:1003 1:1003 1:1003")
    assert without_progress([first, second, third], "others") == []
    other = dataclasses.replace(first, options="others")
    assert without_progress([first, other, second, third], "options") == []


def test_a_run_that_gets_no_further_is_stopped_and_says_why(tmp_path, monkeypatch):
    """Each start completes steps after its checkpoint, and fails at the same one."""
    moment = datetime.datetime(2026, 1, 1)
    for number in range(5):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", f"start {number}")
        moment += datetime.timedelta(minutes=1)
        if number < 3:
            begin_start(tmp_path, 0 if number == 0 else 1000, "options", moment)
            record_running(tmp_path, 1001)
            record_outcome(tmp_path, FAILED, "RuntimeError: loss is not there", 1003)
            continue
        with pytest.raises(InputError) as caught:
            begin_start(tmp_path, 1000, "options", moment)
        assert caught.value.code == exit_codes.NO_PROGRESS
        text = str(caught.value)
        assert "2 starts in a row completed no new step (the run had completed step 1003)" in text
        assert "2026-01-01T00:03:00Z, ended as failed: RuntimeError: loss is not there" in text
        assert read_outcome(tmp_path).name == "running"
        record_outcome(tmp_path, caught.value.code, text)
    begin_start(tmp_path, 1000, "other options", moment)
    (tmp_path / "starts.json").unlink()
    begin_start(tmp_path, 1000, "options", moment)


def test_a_run_that_is_preempted_every_few_minutes_goes_on(tmp_path, monkeypatch):
    for number in range(60):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", f"start {number}")
        begin_start(tmp_path, 1000, "options")
        record_outcome(tmp_path, LEFT, "SIGTERM before the first step", None)
    assert len(json.loads((tmp_path / "starts.json").read_text())) == 50


@pytest.mark.parametrize(
    "content", ["{", "[1]", '[{"start": 1}]', '[{"start": "", "time": "x", "step": 1, "options": ""}]']
)
def test_a_damaged_file_does_not_stop_a_run(tmp_path, content):
    (tmp_path / "starts.json").write_text(content)
    begin_start(tmp_path, 0, "options")
    assert len(json.loads((tmp_path / "starts.json").read_text())) == 1
