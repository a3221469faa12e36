"""``outcome.json``: how the newest start of a run ended."""

import errno
import json
import os

import pytest

from mft_megatron import exit_codes
from mft_megatron.errors import InputError
from mft_megatron.run_folder import outcome
from mft_megatron.run_folder.outcome import read_outcome, record_outcome, record_running, start_name

CODES = {name: code for name, code in vars(exit_codes).items() if isinstance(code, int)}


def recorded(folder):
    found = read_outcome(folder)
    assert found is not None
    return found.code, found.reason, found.step


def test_every_code_has_a_name_of_its_own():
    assert set(exit_codes.NAMES) == set(CODES.values())
    assert len(set(exit_codes.NAMES.values())) == len(exit_codes.NAMES)


def test_it_is_read_as_it_was_recorded(tmp_path):
    assert read_outcome(tmp_path) is None
    record_outcome(tmp_path, exit_codes.LEFT, "SIGTERM:\nsaved", 7)
    found = read_outcome(tmp_path)
    assert (found.name, found.code, found.reason, found.step) == ("left", 10, "SIGTERM: saved", 7)
    assert found.pid == os.getpid()
    assert found.host
    assert found.time.endswith("Z")
    assert [path.name for path in tmp_path.iterdir()] == ["outcome.json"]


def test_the_first_reason_stays_where_other_ranks_only_fail(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    record_running(tmp_path, 4)
    assert read_outcome(tmp_path).name == "running"
    record_outcome(tmp_path, exit_codes.STALLED, "rank 2 did not arrive")
    record_outcome(tmp_path, exit_codes.FAILED, "connection closed by peer")
    assert recorded(tmp_path) == (exit_codes.STALLED, "rank 2 did not arrive", 4)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "b")  # the next start
    record_outcome(tmp_path, exit_codes.FAILED, "a fault")
    assert recorded(tmp_path) == (exit_codes.FAILED, "a fault", None)


def test_a_start_that_the_owner_refused_records_nothing(tmp_path):
    record_running(tmp_path, 4)
    record_outcome(tmp_path, exit_codes.OWNED, "another run owns it")
    assert read_outcome(tmp_path).name == "running"


def test_a_folder_that_does_not_exist_is_not_made(tmp_path):
    record_outcome(tmp_path / "run", exit_codes.BAD_INPUT, "no such option")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_a_line(tmp_path, monkeypatch, capsys):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(outcome, "replace_text", full)
    record_outcome(tmp_path, exit_codes.STORAGE, "the disk is full")
    line = capsys.readouterr().err
    assert line.startswith(f"note: {tmp_path}/outcome.json: the disk is full")
    assert "the outcome is storage" in line


@pytest.mark.parametrize(
    "change",
    ["{", "[]", '{"name": "left"}', {"code": 2}, {"name": "running"}, {"more": 1}, {"step": "7"}, {"time": "7"}],
)
def test_a_damaged_file_is_named(tmp_path, change):
    record_outcome(tmp_path, exit_codes.LEFT, "SIGTERM", 7)
    file = tmp_path / "outcome.json"
    file.write_text(change if isinstance(change, str) else json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError, match=r"outcome\.json: not an outcome"):
        read_outcome(tmp_path)
    record_outcome(tmp_path, exit_codes.LEFT, "SIGTERM", 8)  # the next one replaces it
    assert recorded(tmp_path)[2] == 8


def test_ranks_of_a_start_have_one_name_and_a_restart_another():
    rank = {"RANK": "0", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0"}
    assert start_name(rank) == start_name({**rank, "RANK": "1"})
    assert start_name(rank) != start_name({**rank, "TORCHELASTIC_RESTART_COUNT": "1"})
    assert start_name({}) == start_name({"SLURM_JOB_ID": "4"}) != start_name(rank)
