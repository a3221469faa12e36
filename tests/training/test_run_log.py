"""The log of a run: what it shows on the terminal, and disks that it cannot write to.

Training then continues, a line says so, and no record is lost that the disk takes later.
"""

import errno
import json
import os
import threading

import pytest

from mft_megatron.run_folder.names import METRICS
from mft_megatron.training.log_sinks.board import Board
from mft_megatron.training.log_sinks.record_file import RecordFile
from mft_megatron.training.run_log import RunLog
from tests.full_disk import largest_file

LINE = "a line of forty bytes, with its end, in"


@pytest.mark.parametrize("size", [0, 1, 39, 40, 41, 79, 80, 100])
def test_lines_wait_until_the_disk_takes_them(tmp_path, size):
    file = RecordFile(tmp_path / "lines")
    with largest_file(size):
        for number in range(3):
            error = file.write(f"{number}{LINE[1:]}")
            assert (error is None) == (40 * (number + 1) <= size)
            if error is not None:
                assert error.errno == errno.EFBIG
        # whole lines alone
        assert (tmp_path / "lines").stat().st_size == size // 40 * 40
    assert file.write("the last") is None
    assert file.waiting == []
    assert file.close() is None
    lines = (tmp_path / "lines").read_text().splitlines()
    assert lines == [f"{number}{LINE[1:]}" for number in range(3)] + ["the last"]


def test_a_line_that_was_cut_off_is_removed_later(tmp_path, monkeypatch):
    """The file could not be shortened at once, as on a disk that is read-only for a while."""
    file = RecordFile(tmp_path / "lines")

    def fail(*arguments):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch, largest_file(20):
        patch.setattr(os, "ftruncate", fail)
        assert file.write(LINE).errno == errno.EFBIG
        assert (tmp_path / "lines").stat().st_size == 20
    assert file.write("next") is None
    assert (tmp_path / "lines").read_text() == f"{LINE}\nnext\n"


def test_lines_are_appended(tmp_path):
    (tmp_path / "lines").write_text("before\n")
    file = RecordFile(tmp_path / "lines")
    assert file.write("after") is None
    assert (tmp_path / "lines").read_text() == "before\nafter\n"


@pytest.mark.parametrize("before", ["", '{"step": 1}\n', '{"step": 1}\n' * 20_000])
@pytest.mark.parametrize("part", ['{"step": 2, "lo', '{"text": "' + "x" * 200_000, '"', "\x00" * 30])
def test_a_part_of_a_line_that_a_killed_writer_left_is_removed(tmp_path, before, part):
    (tmp_path / "lines").write_text(before + part)
    file = RecordFile(tmp_path / "lines")
    assert file.cut_off == len(part)
    assert file.write('{"step": 2}') is None
    assert (tmp_path / "lines").read_text() == before + '{"step": 2}\n'


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path):
    (tmp_path / "lines").write_text('{"step": 1}\n{"step": 2}')
    file = RecordFile(tmp_path / "lines")
    assert (file.cut_off, file.write('{"step": 3}')) == (0, None)
    assert [json.loads(line)["step"] for line in (tmp_path / "lines").read_text().splitlines()] == [1, 2, 3]


def test_a_log_says_that_it_removed_a_part(tmp_path, capsys):
    (tmp_path / METRICS).write_text('{"step')
    RunLog(True, str(tmp_path)).close()
    assert "metrics.jsonl: the part of a line at its end is removed; its writer was killed" in capsys.readouterr().out


def test_what_is_lost_at_the_end_is_counted():
    file = RecordFile("/dev/full")
    for _ in range(2):
        assert file.write(LINE).errno == errno.ENOSPC
    assert file.close().errno == errno.ENOSPC
    assert len(file.waiting) == 2


def event(step):
    return {"kind": "event", "event": "exit", "step": step, "consumed_samples": 0, "reason": "x"}


def test_training_continues_without_a_place_for_its_records(tmp_path, capsys):
    log = RunLog(True, str(tmp_path))
    path = tmp_path / "metrics.jsonl"
    with largest_file(100):
        for step in range(3):
            log.write(event(step))
    said = [line.partition("] ")[2] for line in capsys.readouterr().out.splitlines()]
    notes = [line for line in said if line.startswith("note:")]
    assert len(notes) == 1
    assert notes[0].startswith(f"note: {path}: File too large")
    assert notes[0].endswith("; training continues, and records wait")
    assert len(said) == 4
    log.write(event(3))
    assert f"note: {path}: can be written again; no record is missing" in capsys.readouterr().out
    log.close()
    assert len(path.read_text().splitlines()) == 4


def test_records_that_are_lost_are_counted_at_the_end(tmp_path, capsys):
    log = RunLog(True, str(tmp_path))
    with largest_file(0):
        for step in range(3):
            log.write(event(step))
        log.close()
    assert "; 3 records are lost" in capsys.readouterr().out


def test_a_board_that_fails_ends_alone(tmp_path, monkeypatch):
    reported = []
    monkeypatch.setattr(threading, "excepthook", reported.append)
    before = threading.excepthook
    board = Board(str(tmp_path), 1)
    reason, step = None, 0
    with largest_file(300):
        while reason is None:
            step += 1
            assert step < 10_000
            reason = board.write({"loss": 1.0}, step)
    assert reason.startswith("File too large")
    assert board.write({"loss": 1.0}, step) is None
    assert board.close() is None
    assert threading.excepthook == before
    assert reported == []


def test_errors_of_other_threads_are_reported_as_before(tmp_path, monkeypatch):
    reported = []
    monkeypatch.setattr(threading, "excepthook", lambda failed: reported.append(failed.exc_value))
    board, error = Board(str(tmp_path), 1), OSError(errno.ENOSPC, "")

    def fail():
        raise error

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert reported == [error]
    assert board.close() is None


def test_the_thread_of_a_board_that_fails_at_its_start_prints_no_traceback(tmp_path, monkeypatch):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def write(self, data):
        raise OSError(errno.EIO, "Input/output error")

    reported, threads = [], set(threading.enumerate())
    monkeypatch.setattr(threading, "excepthook", reported.append)
    monkeypatch.setattr(RecordWriter, "write", write)
    with pytest.raises(OSError, match="Input/output error"):
        Board(str(tmp_path), 1)
    for thread in set(threading.enumerate()) - threads:
        thread.join()
    assert reported == []


def test_a_board_that_fails_at_its_end(tmp_path, capfd):
    board = Board(str(tmp_path), 1000)
    with largest_file(100):
        board.write({f"loss {number}": 1.0 for number in range(100)}, 1)
        assert board.close().startswith("File too large")
    assert "Traceback" not in capfd.readouterr().err


def test_a_terminal_on_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch):
    log = RunLog(True, str(tmp_path))
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", full)
        log.write(event(1))
        log.print("x")
        with pytest.raises(OSError, match="No space"):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(("number", "end"), [(20, "task19 1.5000"), (21, "1 more task"), (100, "80 more tasks")])
def test_lines_on_the_terminal_list_few_tasks(tmp_path, capsys, number, end):
    tasks = {f"task{i}": {"loss": 1.5, "perplexity": 4.5, "supervised_tokens": 3} for i in range(number)}
    record = {"kind": "valid", "step": 1, "consumed_samples": 4, "loss": 1.5, "token_loss": 1.5, "macro_loss": 1.5}
    log = RunLog(True, str(tmp_path))
    log.write({**record, "tasks": tasks})
    log.close()
    line = capsys.readouterr().out.strip()
    assert line.endswith(f", {end}")
    assert line.count("1.5000") == 2 + min(number, 20)
    assert len(json.loads((tmp_path / METRICS).read_text())["tasks"]) == number
