"""Exports during a run, by a stand-in program whose duration and result each checkpoint's folder controls."""

import errno
import json
import os
import time

import pytest

from mft_megatron.convert import background_export as module
from mft_megatron.convert.background_export import Exports
from mft_megatron.errors import InputError
from mft_megatron.run_folder.description import CheckpointInfo, CheckpointRef, write_info

PROGRAM = """
import json, os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.default_int_handler)
direction, _, checkpoint, _, folder = sys.argv[1:]
checkpoint = pathlib.Path(checkpoint)
try:
    (checkpoint / "begun").touch()
    while (checkpoint / "slow").exists():
        time.sleep(0.01)
except KeyboardInterrupt:
    (checkpoint / "interrupted").touch()
    sys.exit(130)
if (checkpoint / "bad").exists():
    print("warning: before")
    print("error: disk full")
    print("and a line after")
    sys.exit(2)
if (checkpoint / "killed").exists():
    print("warning: a newer release", flush=True)
    os.abort()
print("converted")
print("note: the stop tokens differ")
words = [direction, sys.argv[3], os.environ.get("RANK"), os.environ["CUDA_VISIBLE_DEVICES"]]
assert int(os.environ["MFT_END_WITH"]) == os.getppid()
os.makedirs(folder)
pathlib.Path(folder, "words.json").write_text(json.dumps(words))
"""


@pytest.fixture
def exports(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setenv("RANK", "0")
    return Exports(tmp_path / "out", tmp_path / "program.py", "mcore-to-hf")


def checkpoint(tmp_path, number, *marks):
    """Create a checkpoint's folder; ``marks``: files that the stand-in program obeys."""
    path = tmp_path / "run" / f"iter_{number:07d}"
    path.mkdir(parents=True)
    for mark in marks:
        (path / mark).touch()
    return path


def until(condition):
    """Wait for a true value, and return it."""
    end = time.monotonic() + 30
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def within(exports, run):
    """Run as ``pretrain_mft.py`` does."""
    with exports:
        run()
    exports.refuse_failures()


def test_one_after_the_other(exports, tmp_path):
    first, second = checkpoint(tmp_path, 2, "slow"), checkpoint(tmp_path, 4, "slow")
    with exports:
        exports.add(first)
        exports.add(second)
        assert exports.waiting == (first, second)
        until((first / "begun").exists)
        assert exports.poll() == []
        assert not (second / "begun").exists()
        (first / "slow").unlink()
        (done,) = until(exports.poll)
        assert (done["path"], done["seconds"] > 0) == (str(tmp_path / "out" / first.name), True)
        assert exports.waiting == (second,)
        (second / "slow").unlink()
    assert exports.waiting == ()
    for path in (first, second):
        words = json.loads((tmp_path / "out" / path.name / "words.json").read_text())
        assert words == ["mcore-to-hf", str(path), None, ""]
    assert os.environ["RANK"] == "0"


def test_a_note_of_several_exports_is_printed_once(exports, tmp_path, capfd):
    within(exports, lambda: [exports.add(checkpoint(tmp_path, number)) for number in (2, 4, 6)])
    output = capfd.readouterr().out
    assert output.count("--save-hf: note: the stop tokens differ\n") == 1
    assert output.count("seconds") == 3
    assert "converted" not in output


def test_a_failure_is_reported_and_later_exports_go_on(exports, tmp_path, capfd):
    bad, killed, good = checkpoint(tmp_path, 2, "bad"), checkpoint(tmp_path, 4, "killed"), checkpoint(tmp_path, 6)

    def run():
        for path in (bad, killed, good):
            exports.add(path)
        assert until(exports.poll) == [{"path": str(tmp_path / "out" / bad.name), "failed": "disk full"}]
        assert exports.waiting[0] == bad  # it is kept, so that the user can export it

    with pytest.raises(InputError) as caught:
        within(exports, run)
    line = str(caught.value)
    assert "\n" not in line
    assert f"{bad} was not exported (disk full); later program.py mcore-to-hf --load {bad} --hf " in line
    assert f"{killed} was not exported (exit code -6)" in line
    assert (tmp_path / "out" / good.name / "words.json").exists()
    assert f"--save-hf: path {tmp_path / 'out' / good.name}, seconds" in capfd.readouterr().out


def test_the_error_of_the_run_wins_over_failed_exports(exports, tmp_path):
    bad, good = checkpoint(tmp_path, 2, "bad"), checkpoint(tmp_path, 4)

    def run():
        exports.add(bad)
        exports.add(good)
        raise InputError("diverged")

    with pytest.raises(InputError, match="diverged"):
        within(exports, run)
    assert (tmp_path / "out" / good.name / "words.json").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_ends_its_exports(exports, tmp_path, error):
    first, second = checkpoint(tmp_path, 2, "slow"), checkpoint(tmp_path, 4)

    def run():
        exports.add(first)
        exports.add(second)
        until((first / "begun").exists)
        raise error

    with pytest.raises(error):
        within(exports, run)
    assert (first / "interrupted").exists()
    assert not (second / "begun").exists()
    assert not (tmp_path / "out").exists()


def test_the_newest_is_exported_once(exports, tmp_path, monkeypatch, capsys):
    path, done = checkpoint(tmp_path, 2, "slow"), []
    monkeypatch.setattr(module, "latest_checkpoint", lambda run, option: CheckpointRef(path, None))
    monkeypatch.setattr(module, "main", done.append)
    exports.export_newest(tmp_path / "run")
    assert done == [["mcore-to-hf", "--load", str(path), "--hf", str(tmp_path / "out" / path.name)]]
    with exports:
        exports.add(path)
        exports.export_newest(tmp_path / "run")  # is under way
        (path / "slow").unlink()
    exports.export_newest(tmp_path / "run")
    assert len(done) == 1
    assert "iter_0000002 is there already" in capsys.readouterr().out


def test_exports_that_an_earlier_job_missed_are_added(exports, tmp_path):
    """Not those that are exported, off the interval, unfinished, later than the resumed one, or of another run."""
    run = tmp_path / "run"
    for number in (1, 2, 4, 6, 8):
        path = checkpoint(tmp_path, number)
        info = CheckpointInfo(number, 0, {}, 0, {}, "", 0, 1)
        if number != 4:
            write_info(path, info)
    (tmp_path / "out" / "iter_0000002").mkdir(parents=True)
    with exports:
        exports.catch_up(run, 2, tmp_path / "other" / "iter_0000006")
        assert exports.waiting == ()
        exports.catch_up(run, 2, run / "iter_0000006")
        assert exports.waiting == (run / "iter_0000006",)


def test_an_export_that_cannot_start_ends_alone(exports, tmp_path, monkeypatch):
    """No space for its output, or no process: training and the next export go on."""
    first, second = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)

    def fail(*words):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def run():
        with monkeypatch.context() as patch:
            patch.setattr(module.tempfile, "TemporaryFile", fail)
            exports.add(first)
        (result,) = exports.poll()
        assert result["path"] == str(tmp_path / "out" / first.name)
        assert str(result["failed"]).startswith("the disk is full (")
        assert exports.poll() == []
        assert exports.waiting == (first,)
        exports.add(second)

    with pytest.raises(InputError, match=r"iter_0000002 was not exported \(the disk is full"):
        within(exports, run)
    assert (tmp_path / "out" / second.name / "words.json").exists()
