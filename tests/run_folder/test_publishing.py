"""A job that is killed between any two system calls, or a disk that fails at any of them, leaves whole checkpoints."""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from mft_megatron.run_folder import publishing
from mft_megatron.run_folder.names import BEST, TRACKER, iteration_folder
from mft_megatron.run_folder.publishing import (
    new_token,
    publish,
    remove_leftovers,
    restore_replaced,
    set_aside,
    sync_file,
    unfinished_folder,
)
from mft_megatron.run_folder.replace_text import replace_text

CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "open")


class Killed(BaseException):
    """The process is ended from outside."""


class SystemCalls:
    """Counts the system calls of a save that change something or wait for the disk, and ends or fails one of them."""

    def __init__(self, monkeypatch, fails_at=None, error=Killed, exchanges=True):
        self.count, self._fails_at, self._error = 0, fails_at, error
        for name in CALLS:
            # whether a disk is waited for makes no difference here, and takes long
            call = getattr(os, name) if name != "fsync" else lambda number: None
            monkeypatch.setattr(os, name, self._counted(name, call))
        exchange = publishing._exchange if exchanges else lambda one, other: False
        monkeypatch.setattr(publishing, "_exchange", self._counted("exchange", exchange))
        monkeypatch.setattr(shutil, "rmtree", self._remove)

    def _counted(self, name, call):
        def counted(*arguments, **options):
            if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR):
                return call(*arguments, **options)
            self._step()
            return call(*arguments, **options)

        return counted

    def _remove(self, folder, ignore_errors=False):
        """Remove a folder as shutil does, which uses other forms of the same system calls."""
        try:
            for file in sorted(Path(folder).iterdir()):
                os.unlink(file)
            os.rmdir(folder)
        except OSError:
            if not ignore_errors:
                raise

    def _step(self):
        self.count += 1
        if self.count - 1 == self._fails_at:
            raise self._error() if self._error is Killed else OSError(self._error, os.strerror(self._error))


def write(folder, iteration, content, token=None):
    """Save a checkpoint of two files as the main rank does."""
    path = iteration_folder(folder, iteration)
    unfinished = unfinished_folder(folder, iteration, token or new_token())
    try:
        unfinished.mkdir()
        for name in ("weights", "index"):
            replace_text(unfinished / name, json.dumps(content))
        publish(unfinished, path)
        replace_text(folder / TRACKER, f"{iteration}\n")
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def read(folder, name):
    """The content of the checkpoint that a file names, found as a job that starts does; all of it is of one save."""
    path = iteration_folder(folder, int((folder / name).read_text()))
    if not path.is_dir():
        restore_replaced(path)
    weights, index = (json.loads((path / file).read_text()) for file in ("weights", "index"))
    assert weights == index
    assert sorted(file.name for file in path.iterdir()) == ["index", "weights"]
    return weights


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.fixture
def run(tmp_path):
    """A run folder with checkpoints 5 and 10; 10 is the newest and 5 the best."""

    first = tmp_path / "first"
    first.mkdir()
    for iteration in (5, 10):
        write(first, iteration, f"old {iteration}")
    (first / BEST).write_text("5\n")
    return lambda number: shutil.copytree(first, tmp_path / f"run{number}")


def number_of_calls(run, monkeypatch, iteration, exchanges):
    folder = run("count")
    with monkeypatch.context() as patch:
        calls = SystemCalls(patch, exchanges=exchanges)
        write(folder, iteration, "new")
    shutil.rmtree(folder)
    return calls.count


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("iteration", [5, 10, 15])
def test_killed_at_any_call_the_newest_and_the_best_are_whole(run, monkeypatch, iteration, exchanges):
    count = number_of_calls(run, monkeypatch, iteration, exchanges)
    assert count > 12
    seen = set()
    for number in range(count):
        folder = run(number)
        with monkeypatch.context() as patch:
            SystemCalls(patch, number, exchanges=exchanges)
            with pytest.raises(Killed):
                write(folder, iteration, "new")
        newest = read(folder, TRACKER)
        assert newest in ("old 10", "new")
        assert read(folder, BEST) in ({"old 5", "new"} if iteration == 5 else {"old 5"})
        seen.add(newest)
        # the next job removes what is unfinished, and saves the same iteration
        remove_leftovers(folder)
        assert hidden(folder) == []
        assert read(folder, TRACKER) == newest
        write(folder, iteration, "again")
        assert read(folder, TRACKER) == "again"
        assert hidden(folder) == []
    assert seen == {"old 10", "new"}


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_link_to_a_checkpoint_elsewhere_is_replaced_and_the_checkpoint_stays(run, tmp_path, monkeypatch, exchanges):
    folder, elsewhere = run(0), tmp_path / "elsewhere"
    iteration_folder(folder, 10).rename(elsewhere)
    iteration_folder(folder, 10).symlink_to(elsewhere)
    there = sorted(elsewhere.iterdir())
    with monkeypatch.context() as patch:
        SystemCalls(patch, exchanges=exchanges)
        write(folder, 10, "new")
    assert read(folder, TRACKER) == "new"
    assert hidden(folder) == []
    assert sorted(elsewhere.iterdir()) == there != []


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_call_leaves_the_previous_checkpoint_and_nothing_else(
    run, monkeypatch, number, exchanges
):
    for iteration in (10, 15):
        for fails_at in range(number_of_calls(run, monkeypatch, iteration, exchanges)):
            folder = run(f"{iteration}.{fails_at}")
            with monkeypatch.context() as patch:
                SystemCalls(patch, fails_at, number, exchanges)
                with contextlib.suppress(OSError):
                    write(folder, iteration, "new")
            assert read(folder, TRACKER) in ("old 10", "new")
            assert read(folder, BEST) == "old 5"
            remove_leftovers(folder)
            assert hidden(folder) == []


def test_everything_is_on_the_disk_before_it_is_named(run, monkeypatch):
    """A machine that loses power may forget what was not synchronised, in any order."""
    synced, folder = [], run(0)
    sync = os.fsync

    def fsync(number):
        synced.append(os.path.realpath(f"/proc/self/fd/{number}"))
        sync(number)

    def rename(source, target, call=os.rename):
        if Path(source).is_dir():
            assert {str(file) for file in Path(source).iterdir()} <= renamed | set(synced)
            assert synced[-1] == str(source)
        call(source, target)

    def replace(source, target, call=os.replace):
        assert synced[-1] == str(source)
        if Path(target).name == TRACKER:
            assert str(folder) in synced
        call(source, target)
        renamed.add(str(target))

    renamed = set()
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", replace)
    write(folder, 15, "new")
    assert synced[-1] == str(folder)


def test_what_others_have_in_a_run_folder_is_no_leftover(tmp_path):
    names = (".git", ".saving", ".saving.notes", ".removing.iter_5.mine", "x.5.tmp", ".hidden")
    for name in names:
        (tmp_path / name).mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / ".saving.iter_0000005.00ff").symlink_to(elsewhere)
    assert remove_leftovers(tmp_path) == []
    assert remove_leftovers(tmp_path / "none") == []
    assert {path.name for path in tmp_path.iterdir()} == {*names, "elsewhere", ".saving.iter_0000005.00ff"}


def test_leftovers_are_named(tmp_path):
    (tmp_path / f".{TRACKER}.77.tmp").write_text("")
    (tmp_path / ".of_others.77.tmp").write_text("")
    unfinished_folder(tmp_path, 5, "00ff").mkdir()
    write(tmp_path, 10, "old")
    aside = set_aside(iteration_folder(tmp_path, 10))
    assert not iteration_folder(tmp_path, 10).exists()
    removed = [path.name for path in remove_leftovers(tmp_path)]
    assert removed == sorted([aside.name, ".saving.iter_0000005.00ff", f".{TRACKER}.77.tmp"])
    assert hidden(tmp_path) == [".of_others.77.tmp"]


def test_a_file_that_is_gone_cannot_be_synchronised(tmp_path):
    with pytest.raises(FileNotFoundError):
        sync_file(tmp_path / "gone")
