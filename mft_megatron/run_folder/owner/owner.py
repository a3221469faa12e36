"""One owner of a run folder at a time.

::

    DIR/.owner.lock    locked by the owner: the kernel ends the lock with the process
    DIR/owner.json     who it is; its time of change is renewed every 10 s, the beat

The lock says at once that an owner has ended, where its processes or every machine see it (:mod:`.file_lock`).
Elsewhere the beat decides, which needs no locks and no clocks that agree: an owner on another machine whose beat has
not changed for 60 s is gone. It may come back, as a machine that was suspended does: an owner looks into ``owner.json``
before each save, and once another run is in there it saves nothing more.
"""

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mft_megatron.errors import InputError
from mft_megatron.exit_codes import FAILED, OWNED
from mft_megatron.run_folder.names import LOCK, OWNER, TRACKER
from mft_megatron.run_folder.replace_text import replace_text

from .file_lock import Attempt, FileLock, Reach, reach_of_locks
from .observation import Observation
from .record import OwnerRecord, is_running, parse, this_process


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds of ownership.

    Attributes:
        beat: between two beats.
        silence: without a beat after which an owner that cannot be asked is gone.
        patience: that an owner which is there, or the helpers of one that is gone, have to end.
        settle: after which of two runs that became the owner on machines without common locks only one is left.
        look: between two looks while waiting.
    """

    beat: float = 10.0
    silence: float = 60.0
    patience: float = 5.0
    settle: float = 3.0
    look: float = 0.25


PACE = Pace()


def say_line(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


class Owner:
    """Ownership of a run folder by this process; a context manager that gives it back, if it was acquired."""

    def __init__(
        self,
        folder: Path | str,
        what: str = "training",
        option: str = "--save",
        say: Callable[[str], None] = say_line,
        pace: Pace = PACE,
    ):
        """Prepare, before a checkpoint of the folder is chosen to start from; nothing is written.

        Args:
            folder: the run folder.
            what: what this process does with it, in a word.
            option: the option that names the folder, for messages.
            say: takes lines for the user.
            pace: seconds of ownership.
        """
        self._folder, self._what, self._option, self._say, self._pace = Path(folder), what, option, say, pace
        self._lock = FileLock(self._folder / LOCK)
        self._mine: OwnerRecord | None = None
        self._ended, self._doubted = threading.Event(), False
        self._reach = Reach.UNKNOWN
        self._newest = self._read_tracker()

    def __enter__(self) -> "Owner":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    @property
    def _file(self) -> Path:
        return self._folder / OWNER

    def acquire(self) -> None:
        """Become the owner of the folder, which is made if needed; waits for an owner that is about to end.

        Raises:
            InputError: another process owns it, with the exit code OWNED; or it has completed a checkpoint and ended
                since this one looked for a checkpoint to start from.
            OSError: the folder cannot be written.
        """
        if self._mine is not None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._reach = reach_of_locks(self._folder)
        try:
            self._become_owner()
        except BaseException:
            self._lock.release()
            raise
        if self._read_tracker() != self._newest:
            self.release()
            raise InputError(
                f"{self._option} {self._folder}: the job before this one has completed a checkpoint since this one "
                "started; start again, and it goes on from that",
                code=FAILED,
            )
        threading.Thread(target=self._beat, name="owner of the run folder", daemon=True).start()

    def refuse_if_lost(self) -> None:
        """Check that this process still owns the folder, if it acquired it; before anything is made final there.

        Raises:
            InputError: another run has taken it over, with the exit code OWNED.
            OSError: the file system does not say.
        """
        if self._mine is None:
            return
        record = self._read()
        if record is None:  # somebody has removed the file
            self._create(self._mine)
            record = self._read()
        if record is not None and record.token != self._mine.token:
            raise InputError(
                f"{self._folder}: this run no longer owns its run folder, and saves nothing more: it gave no sign of "
                f"life, and the folder was taken over by {record.describe()}; see what that run does before you start "
                "another one",
                always=True,
                code=OWNED,
            )

    def refuse_if_doubted(self) -> None:
        """Check as :meth:`refuse_if_lost`, if the last beat found another owner; costs nothing otherwise."""
        if self._doubted:
            self.refuse_if_lost()

    def release(self) -> None:
        """Give the folder back; nothing if this process does not own it."""
        if self._mine is not None:
            self._ended.set()
            with contextlib.suppress(OSError):
                record = self._read()
                if record is not None and record.token == self._mine.token:
                    self._file.unlink(missing_ok=True)
            self._mine = None
        self._lock.release()

    def _become_owner(self) -> None:
        watch = Observation()
        while True:
            attempt = self._lock.acquire()
            record = self._read()
            watch.see(record, self._beat_of_file())
            if record is None and attempt is not Attempt.REFUSED:
                mine = this_process(self._what)
                if self._create(mine):
                    break
                continue
            verdict = self._judge(record, attempt, watch)
            if isinstance(verdict, str):
                mine = this_process(self._what)
                if attempt is Attempt.REFUSED:  # of a machine that is gone, and its file server has not noticed
                    self._lock.remove_file()
                    if self._lock.acquire() is Attempt.REFUSED:
                        continue
                assert record is not None
                if self._take_over(mine, record, certain=attempt is Attempt.HELD and self._reach is Reach.ALL):
                    self._say(f"{self._option} {self._folder}: taken over from {record.describe()}: {verdict}")
                    break
                continue
            time.sleep(self._pace.look)
        self._mine = mine
        if attempt is Attempt.IMPOSSIBLE or self._reach is not Reach.ALL:
            why = attempt.value if attempt is Attempt.IMPOSSIBLE else self._reach.value
            self._say(
                f"{self._option} {self._folder}: {why}: runs of other machines recognise this run by its sign of life "
                f"in {OWNER}, and one that ends without a word is taken over after {self._pace.silence:g} s"
            )

    def _judge(self, record: OwnerRecord | None, attempt: Attempt, watch: Observation) -> str | None:
        """Say why the owner is gone; ``None`` while that is not known.

        Raises:
            InputError: it is not gone.
        """
        pace, here = self._pace, this_process(self._what)
        if record is None:  # another process is just about to become the owner, or gives the folder back
            if watch.seconds > pace.patience:
                raise self._refusal("another process holds its lock and does not say who it is", "")
            return None
        if record.same_processes(here):
            if is_running(record):
                if watch.seconds > pace.patience:
                    raise self._refusal(f"it is in use by {record.describe()}", "which is running")
                self._say_waiting(watch, record, f"{pace.patience:g} s for it to end")
                return None
            if attempt is not Attempt.REFUSED:
                return "that process has ended"
            if watch.seconds > 2 * pace.patience:
                raise self._refusal(
                    f"it was in use by {record.describe()}",
                    "which has ended, but a process that it started still holds the lock",
                )
            return None
        if attempt is Attempt.HELD and (
            self._reach is Reach.ALL or (self._reach is Reach.HOST and record.same_machine(here))
        ):
            return "its lock has ended"
        if watch.beaten:
            raise self._refusal(f"it is in use by {record.describe()}", "which gives signs of life")
        if watch.seconds > pace.silence:
            return f"it gave no sign of life for {pace.silence:g} s"
        self._say_waiting(watch, record, f"{pace.silence:g} s for a sign of life")
        return None

    def _say_waiting(self, watch: Observation, record: OwnerRecord, what: str) -> None:
        """Say once that, and for what, this process waits."""
        if watch.announces(min(1.0, self._pace.patience / 2)):
            self._say(f"{self._option} {self._folder}: in use by {record.describe()}; waiting up to {what}")

    def _refusal(self, who: str, state: str) -> InputError:
        which = f", {state}" if state else ""
        return InputError(
            f"{self._option} {self._folder}: {who}{which}; wait for it, end it, or choose another {self._option}",
            code=OWNED,
        )

    def _take_over(self, mine: OwnerRecord, gone: OwnerRecord, certain: bool) -> bool:
        """Write the own record over that of an owner that is gone; whether it stays there."""
        found = self._read()
        if found is None or found.token != gone.token:  # another run was faster
            return False
        try:
            replace_text(self._file, _as_text(mine))
        except FileNotFoundError:  # another run is the owner already, and removes what was left unfinished
            return False
        if not certain:
            # without locks another run may do the same now: the last one to write is the owner
            time.sleep(self._pace.settle)
            record = self._read()
            return record is not None and record.token == mine.token
        return True

    def _create(self, mine: OwnerRecord) -> bool:
        """Write the own record if there is none, which every file system does for one process alone."""
        try:
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "w") as file:
                file.write(_as_text(mine))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            self._file.unlink(missing_ok=True)
            raise
        return True

    def _read(self) -> OwnerRecord | None:
        try:
            return parse(self._file.read_text(errors="replace"))
        except FileNotFoundError:
            return None

    def _read_tracker(self) -> str:
        try:
            return (self._folder / TRACKER).read_text(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return ""

    def _beat_of_file(self) -> int:
        # a file that is opened is asked for again where machines cache what they know of files
        try:
            with open(self._file, "rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return 0

    def _beat(self) -> None:
        while not self._ended.wait(self._pace.beat):
            with contextlib.suppress(OSError):  # the next beat is soon enough
                record, mine = self._read(), self._mine
                if mine is None or (record is not None and record.token != mine.token):
                    self._doubted = True
                    return
                os.utime(self._file)


def _as_text(record: OwnerRecord) -> str:
    return json.dumps(dataclasses.asdict(record), indent=2) + "\n"


def in_use(folder: Path | str) -> bool:
    """Whether a process seems to own a run folder; its lock is not asked."""
    file = Path(folder) / OWNER
    try:
        record = parse(file.read_text(errors="replace"))
        silent = time.time() - file.stat().st_mtime
    except OSError:
        return False
    return is_running(record) if record.same_processes(this_process("")) else silent < PACE.silence


def owner_in_another_job(folder: Path | str) -> str | None:
    """Say which other job of the scheduler owns a run folder; ``None`` if none, or if this process is in no job."""
    try:
        record = parse((Path(folder) / OWNER).read_text(errors="replace"))
    except OSError:
        return None
    job = this_process("").job
    return record.describe() if job and record.job and record.job != job else None


def describe_owner(folder: Path | str) -> str | None:
    """Say who owns a run folder, for people; ``None`` without an owner. Whether it still runs is not always known.

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        record = parse((Path(folder) / OWNER).read_text(errors="replace"))
    except FileNotFoundError:
        return None
    if not record.same_processes(this_process("")):
        age = time.time() - (Path(folder) / OWNER).stat().st_mtime
        return f"{record.describe()}; its last sign of life was {max(age, 0):.0f} s ago"
    return f"{record.describe()}; {'running' if is_running(record) else 'ended without giving the folder back'}"
