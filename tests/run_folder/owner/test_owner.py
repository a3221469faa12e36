"""One owner of a run folder: two starts at once, owners that ended without a word, other machines, a lost folder."""

import dataclasses
import fcntl
import json
import multiprocessing
import os
import signal
import time

import pytest

from mft_megatron.errors import InputError
from mft_megatron.exit_codes import FAILED, OWNED
from mft_megatron.run_folder.names import LOCK, OWNER, TRACKER
from mft_megatron.run_folder.owner import owner as module
from mft_megatron.run_folder.owner.file_lock import Attempt, FileLock, Reach
from mft_megatron.run_folder.owner.owner import Owner, Pace, describe_owner
from mft_megatron.run_folder.owner.record import parse, this_process

FAST = Pace(beat=0.05, silence=0.4, patience=0.3, settle=0.3, look=0.02)
_fork = multiprocessing.get_context("fork")


@pytest.fixture
def lines():
    return []


@pytest.fixture
def owner(tmp_path, lines):
    owners = []

    def make(**pace):
        owners.append(Owner(tmp_path, say=lines.append, pace=dataclasses.replace(FAST, **pace)))
        return owners[-1]

    yield make
    for one in owners:
        one.release()


def write_record(folder, **changes):
    """The record of an owner that this test has made up."""
    record = dataclasses.replace(this_process("training"), **changes)
    (folder / OWNER).write_text(json.dumps(dataclasses.asdict(record)))
    return record


def reaching(monkeypatch, reach):
    monkeypatch.setattr(module, "reach_of_locks", lambda folder: reach)


def test_a_folder_is_owned_and_given_back(tmp_path, owner, lines):
    with owner() as first:
        first.acquire()
        first.refuse_if_lost()
        assert parse((tmp_path / OWNER).read_text()).pid == os.getpid()
        assert describe_owner(tmp_path).endswith("; running")
    assert list(tmp_path.iterdir()) == []
    assert describe_owner(tmp_path) is None
    owner().acquire()
    assert lines == []


def test_a_running_owner_is_named(owner, lines):
    owner().acquire()
    with pytest.raises(InputError, match=f"in use by training on .*process {os.getpid()}, since .*running; wait") as it:
        owner().acquire()
    assert it.value.code == OWNED
    assert "waiting up to 0.3 s for it to end" in lines[0]


def _race(folder, barrier, results, locks):
    if not locks:
        FileLock.acquire = lambda self: Attempt.IMPOSSIBLE
    one = Owner(folder, say=lambda line: None, pace=FAST)
    barrier.wait()
    try:
        one.acquire()
        results.put("owner")
        time.sleep(1.2)
        one.refuse_if_lost()
    except InputError as error:
        results.put(error.code)


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("left", [False, True])
def test_of_many_starts_at_once_one_wins(tmp_path, locks, left):
    """Also where an owner that is gone has left its record, which all of them replace."""
    if left:
        write_record(tmp_path, host="other", token="gone")
    barrier, results = _fork.Barrier(6), _fork.SimpleQueue()
    racers = [_fork.Process(target=_race, args=(tmp_path, barrier, results, locks)) for _ in range(6)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    outcomes = []
    while not results.empty():
        outcomes.append(results.get())
    assert sorted(map(str, outcomes)) == ["16"] * 5 + ["owner"]


def _own(folder, ready, helper):
    Owner(folder, pace=FAST).acquire()
    if helper:
        _fork.Process(target=time.sleep, args=(helper,)).start()
    ready.put(os.getpid())
    time.sleep(60)


def killed_owner(folder, helper=0.0):
    """Let a process own a folder, and kill it; a process that it has forked lives for ``helper`` seconds more."""
    ready = _fork.SimpleQueue()
    process = _fork.Process(target=_own, args=(folder, ready, helper))
    process.start()
    ready.get()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.pid


def test_a_killed_owner_is_replaced_at_once(tmp_path, owner, lines):
    process = killed_owner(tmp_path)
    assert describe_owner(tmp_path).endswith("ended without giving the folder back")
    start = time.monotonic()
    owner(patience=30).acquire()
    assert time.monotonic() - start < 5
    assert len(lines) == 1
    assert f"process {process}, " in lines[0]
    assert lines[0].endswith("that process has ended")


def test_the_helpers_of_a_killed_owner_are_waited_for(tmp_path, owner):
    killed_owner(tmp_path, helper=0.4)
    owner(patience=5).acquire()
    owner().release()


def test_helpers_that_stay_are_named(tmp_path, owner):
    killed_owner(tmp_path, helper=2)
    with pytest.raises(InputError, match=r"has ended, but a process that it started still holds the lock") as refusal:
        owner().acquire()
    assert refusal.value.code == OWNED


def test_a_machine_whose_locks_are_seen_is_gone_with_its_lock(tmp_path, owner, monkeypatch, lines):
    reaching(monkeypatch, Reach.ALL)
    write_record(tmp_path, host="other", token="gone")
    owner(silence=60, patience=60).acquire()
    assert lines == [line for line in lines if "taken over from training on other" in line and "lock has ended" in line]


@pytest.mark.parametrize("reach", [Reach.HOST, Reach.UNKNOWN])
def test_a_silent_machine_is_gone_after_a_while(tmp_path, owner, monkeypatch, lines, reach):
    reaching(monkeypatch, reach)
    write_record(tmp_path, host="other", token="gone")
    start = time.monotonic()
    owner().acquire()
    assert time.monotonic() - start > FAST.silence
    waiting, taken, weak = lines
    assert "waiting up to 0.4 s for a sign of life" in waiting
    assert "no sign of life for 0.4 s" in taken
    assert reach.value in weak


def test_a_machine_that_gives_signs_of_life_is_not_gone(tmp_path, owner, monkeypatch):
    reaching(monkeypatch, Reach.HOST)
    one = owner()
    one.acquire()
    record = json.loads((tmp_path / OWNER).read_text())
    (tmp_path / OWNER).write_text(json.dumps({**record, "host": "other"}))  # its thread keeps beating
    (tmp_path / LOCK).unlink()  # its lock is not seen from here
    with pytest.raises(InputError, match=r"in use by training on other.*gives signs of life") as refusal:
        owner(silence=30).acquire()
    assert refusal.value.code == OWNED


def test_the_lock_that_a_server_keeps_for_a_machine_that_is_gone(tmp_path, owner, lines):
    write_record(tmp_path, host="other", token="gone")
    with open(tmp_path / LOCK, "w") as kept:
        fcntl.flock(kept, fcntl.LOCK_EX)
        one = owner()
        one.acquire()
        with pytest.raises(InputError, match="which is running"):
            owner().acquire()
    assert "no sign of life" in lines[1]


def test_a_damaged_record_is_one_of_nobody_known(tmp_path, owner, lines):
    (tmp_path / OWNER).write_text("{")
    owner().acquire()
    assert "taken over from something on an unknown machine" in lines[-1]


@pytest.mark.parametrize("text", ["", "[]", "3", '{"pid": "x"}', "[" * 100_000, "\udcff"])
def test_damaged_records_are_read(text):
    assert parse(text).token == "damaged"


def test_who_has_lost_the_folder_saves_nothing_more(tmp_path, owner):
    one = owner()
    one.acquire()
    one.refuse_if_doubted()
    write_record(tmp_path, host="other", token="another")
    with pytest.raises(InputError, match=r"no longer owns .* taken over by training on other") as refusal:
        one.refuse_if_lost()
    assert (refusal.value.code, refusal.value.always) == (OWNED, True)
    time.sleep(5 * FAST.beat)
    with pytest.raises(InputError, match="no longer owns"):
        one.refuse_if_doubted()
    one.release()
    assert parse((tmp_path / OWNER).read_text()).token == "another"


def test_a_record_that_somebody_removed_is_written_again(tmp_path, owner):
    one = owner()
    one.acquire()
    (tmp_path / OWNER).unlink()
    one.refuse_if_lost()
    assert parse((tmp_path / OWNER).read_text()).pid == os.getpid()


def test_a_checkpoint_that_was_completed_meanwhile_is_not_passed_over(tmp_path, owner):
    before, after = owner(), owner()
    (tmp_path / TRACKER).write_text("20\n")
    with pytest.raises(InputError, match="completed a checkpoint since this one started; start again") as refusal:
        before.acquire()
    assert refusal.value.code == FAILED
    assert not (tmp_path / OWNER).exists()
    after._newest = "20\n"
    after.acquire()


def test_the_record_names_the_job():
    assert "job 4711, process" in this_process("training", {"SLURM_JOB_ID": "4711"}).describe()
