"""The watchdog of a rank: a thread that notices that its process makes no progress, reports that and ends the process.

::

    progress marks ─► no new one for the limit ─► alarm on the notice board ─► each rank: notice and report
                                                     one rank: who did not arrive ◄─┘
                                                        └─► all exit with STALLED

It takes part in no collective. All that may hang itself (the store of the notices, the disk, the terminal) is asked in
threads that may be left behind, so that the process ends within :data:`DEADLINE` in any case.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from mft_megatron import progress_marks
from mft_megatron.errors import InputError, in_a_line
from mft_megatron.exit_codes import STALLED as EXIT_CODE
from mft_megatron.mcore.parallel import flight_recorder
from mft_megatron.mcore.parallel.notice_board import NoticeBoard
from mft_megatron.progress_marks import Mark, Position
from mft_megatron.run_folder.names import STALLS
from mft_megatron.run_folder.outcome import record_outcome

from . import process_state, reports
from .errands import Errands
from .limits import Limits
from .notice import LEFT, RUNNING, STALLED, Notice, listed, packs_of, place_of, ranks_text
from .stacks import main_line, stacks
from .verdict import verdict

# seconds from the alarm: for the reports of the others, until another rank speaks for rank 0, until the process ends
GRACE, SUCCESSION, DEADLINE = 2.0, 2.7, 4.0
# seconds that the rank that has spoken leaves the others
FAREWELL = 0.4
# the longest time between two looks at the marks, and between two notices of a rank that makes progress
LONGEST_TICK, LONGEST_BEAT = 0.5, 10.0
# the same until this rank, and until every rank, has posted a notice: a rank may hang soon after the start
FIRST_TICK, FIRST_BEAT = 0.05, 0.2
# this much of a limit without progress makes a rank look for an alarm of another one
SUSPICION = 0.5
ALARM, FOLDER, SPEAKER, SPOKEN, KILLED = "alarm", "folder", "speaker", "spoken", "killed"
NOBODY = "nobody"
WITHOUT_MESSAGE = "ended without a message, as a killed process does"


class Watchdog:
    """The watchdog of this process; see :func:`watching`."""

    def __init__(
        self,
        limits: Limits,
        rank: int,
        world_size: int,
        run_folder: Path | None,
        rank_text: Callable[[], str] = str,
        leave: Callable[[int], object] = os._exit,
    ):
        """
        Args:
            limits: at least one of them is set.
            rank: of this process.
            world_size: number of ranks.
            run_folder: takes the reports; ``None`` without one.
            rank_text: says where the rank is in its parallel layout, for the report.
            leave: ends the process with an exit code.
        """
        self._limits, self._rank, self._world_size, self._run_folder = limits, rank, world_size, run_folder
        self._rank_text, self._leave = rank_text, leave
        self._board = NoticeBoard(rank, world_size) if world_size > 1 else None
        self._errands = {name: Errands(f"watchdog: {name}") for name in ("notices", "disk", "terminal")}
        self._host, (self._pid, self._born) = socket.gethostname(), process_state.this_process()
        self._tick = min(limits.shortest / 20, LONGEST_TICK)
        self._beat = min(limits.shortest / 8, LONGEST_BEAT)
        self._mark: Mark | None = None
        # seconds that this process, not counting time in which it was stopped, has made no progress
        self._idle = 0.0
        # the first notices of all ranks, which say what process each is where the store has ended with one of them
        self._first: dict[int, Notice] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self, error: BaseException | None) -> None:
        """End watching; the others learn that an error ends this rank, and where it was."""
        self._over.set()
        self._thread.join()
        if error is not None and self._board is not None and self._board.connected:
            killed = self._killed()
            if 0 not in killed:  # the store may have ended with rank 0
                self._post(LEFT, in_a_line(error))
            if killed and (0 in killed or self._agree(KILLED, str(self._rank)) == str(self._rank)):
                places = "; ".join(f"{rank}: process {one.pid} on {one.host}" for rank, one in killed.items())
                how = "have ended; one that printed no error was killed" if 0 in killed else WITHOUT_MESSAGE
                self._say(f"error: {ranks_text(killed)} {how} ({places})")
        for errands in self._errands.values():
            errands.close(patience=0.1)

    def _watch(self) -> None:
        beaten, before = -self._beat, time.monotonic()
        while not self._over.wait(self._tick if self._board is None or self._board.connected else FIRST_TICK):
            now = time.monotonic()
            position = progress_marks.position()
            if position.mark is self._mark:
                # a process that was stopped, as by Ctrl-Z, has lost nothing of its time
                self._idle += min(now - before, 5 * self._tick)
            else:
                self._mark, self._idle = position.mark, min(now - position.mark.since, 5 * self._tick)
            before = now
            limit = self._limits.of(position)
            if limit and self._idle >= limit:
                self._end(position, limit)
                return
            if self._board is None or not self._board.ready():
                continue
            if self._idle > SUSPICION * self._limits.shortest and self._ask(self._has(ALARM), 0.5):
                self._end(position, limit)
                return
            if now - beaten >= (self._beat if self._first else min(self._beat, FIRST_BEAT)):
                beaten = now
                self._post(RUNNING, patience=0)
                if not self._first and self._ask(self._board.complete, 0.5):
                    self._first = self._notices()

    def _end(self, position: Position, limit: float) -> None:
        """Report that this rank makes no progress, let one rank say which ones did not arrive, and end the process."""
        begun = time.monotonic()

        def left(until: float) -> float:
            return max(begun + until - time.monotonic(), 0)

        place, packs = place_of(position), packs_of(position)
        name = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
        self._agree(ALARM, str(self._rank))
        self._post(STALLED)
        agreed = self._agree(FOLDER, name)
        title = f"rank {self._rank}: no progress for {self._idle:.0f} s: {place}, packs {listed(packs)}"
        text = self._report(title, limit)
        folder = None
        if self._run_folder is not None:
            run_folder = self._run_folder
            name = agreed or self._errands["disk"].run(lambda: reports.folder_name(run_folder), 0.5) or name
            folder = run_folder / STALLS / name
            notice = self._notice(STALLED).as_text()
            self._errands["disk"].run(lambda: reports.write_report(folder, self._rank, text, notice), left(GRACE) / 2)
            self._errands["disk"].run(lambda: self._write_trace(folder), left(GRACE))
        self._say(f"{title} ({main_line()[0]})" if folder is not None else text)
        if self._speaks(folder, left):
            self._speak(position, folder, left)
        else:
            silent = (self._agree(SPOKEN, NOBODY) or NOBODY).split()
            ranks = [int(rank) for rank in silent if rank != NOBODY]
            self._kill_stopped(self._notices(ranks).values() if ranks else ())
        self._errands["terminal"].run(lambda: (sys.stdout.flush(), sys.stderr.flush()), 0.2)
        self._leave(EXIT_CODE)

    def _write_trace(self, folder: Path) -> None:
        """Write what the flight recorder holds, if there is one."""
        trace = flight_recorder.recorded()
        if trace is not None:
            reports.write_trace(folder, self._rank, trace)

    def _report(self, title: str, limit: float) -> str:
        """The whole report of this rank."""
        with contextlib.suppress(Exception):  # parallel state may be half made
            title += f"\n{self._rank_text()}"
        position = progress_marks.position()
        packs = [int(pack) for pack in position.packs]
        return (
            f"{title}\nhost {self._host}, process {self._pid}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}; the limit is "
            f"{limit:g} s\npacks of the step, all ranks: {' '.join(map(str, packs)) or 'none'}\n\n{stacks()}"
        )

    def _speaks(self, folder: Path | None, left: Callable[[float], float]) -> bool:
        """Wait for the other ranks' reports; whether this is the rank that speaks for all."""
        if self._board is None:
            return True
        while left(GRACE if self._rank == 0 else SUCCESSION):
            if (self._rank == 0 and self._all_known(folder)) or self._ask(self._has(SPOKEN), 0.5):
                break
            time.sleep(0.1)
        speaker = self._agree(SPEAKER, str(self._rank))
        if speaker is None:  # the store does not answer: the disk decides, or everybody speaks
            claimed = folder is not None and self._errands["disk"].run(lambda: reports.claim_summary(folder), 0.3)
            return folder is None or bool(claimed)
        if speaker == str(self._rank):
            return True
        while left(DEADLINE) and not self._ask(self._has(SPOKEN), 0.5):
            time.sleep(0.1)
        return False

    def _killed(self) -> dict[int, Notice]:
        """Ranks of this machine whose process is gone and said nothing: the error of one that loses them says less."""
        known = self._first or self._notices()
        gone = {rank: one for rank, one in known.items() if self._state(one) == process_state.GONE}
        if 0 in gone:  # with the store: which of these have said why is not known
            return gone
        said = self._notices(gone) if gone else {}
        return {rank: one for rank, one in gone.items() if rank not in said or said[rank].state == RUNNING}

    def _speak(self, position: Position, folder: Path | None, left: Callable[[float], float]) -> None:
        """Say in one line which ranks did not arrive."""
        notices = {**self._first, **self._written(folder), **self._notices(), self._rank: self._notice(STALLED)}
        states = {rank: state for rank, notice in notices.items() if (state := self._state(notice)) is not None}
        reason = verdict(notices, self._world_size, time.time(), states)
        where = f"; reports are in {folder}" if folder is not None else ""
        line = f"no progress for {self._idle:.0f} s: {reason}{where}"
        self._say(f"error: {line}")
        run_folder = self._run_folder
        if run_folder is not None and folder is not None:
            step = None if position.step is None else position.step - 1
            disk = self._errands["disk"]
            disk.run(lambda: (folder / reports.SUMMARY).write_text(f"{line}\n"), min(left(DEADLINE), 0.5))
            disk.run(lambda: record_outcome(run_folder, EXIT_CODE, line, step), min(left(DEADLINE), 0.5))
        silent = [rank for rank in range(self._world_size) if rank not in notices or notices[rank].state != STALLED]
        self._agree(SPOKEN, " ".join(map(str, silent)) or NOBODY)
        self._kill_stopped([notices[rank] for rank in silent if rank in notices])
        if self._board is not None:  # the others see it before the store may end with this rank
            time.sleep(FAREWELL)

    def _all_known(self, folder: Path | None) -> bool:
        """Whether each rank has reported, or is a process of this machine that cannot."""
        found = {**self._first, **(self._notices() or self._written(folder))}
        unable = (process_state.STOPPED, process_state.GONE)
        known = [one for one in found.values() if one.state != RUNNING or self._state(one) in unable]
        return len(known) == self._world_size

    def _written(self, folder: Path | None) -> dict[int, Notice]:
        """Notices in the reports of all ranks, which are there also where the store does not answer."""
        if folder is None:
            return {}
        texts = self._errands["disk"].run(lambda: reports.reported(folder), 0.5) or {}
        return {rank: Notice.from_text(text) for rank, text in texts.items()}

    def _notices(self, ranks: Collection[int] | None = None) -> dict[int, Notice]:
        """The newest notices of some or all ranks; none where the store does not answer."""
        if self._board is None:
            return {}
        board = self._board
        texts = self._errands["notices"].run(lambda: board.notices(ranks), 1) or {}
        return {rank: Notice.from_text(text) for rank, text in texts.items()}

    def _notice(self, state: str, also: str = "") -> Notice:
        place, now = place_of(progress_marks.position()), time.time()
        line, waits = main_line() if state == STALLED else (also, False)
        return Notice(self._rank, self._host, self._pid, self._born, state, place, self._idle, now, line, waits)

    def _agree(self, name: str, value: str) -> str | None:
        """Propose a value on the board; the first proposal of all ranks, ``None`` where the store does not answer."""
        board = self._board
        return None if board is None else self._errands["notices"].run(lambda: board.agree(name, value), 0.5)

    def _post(self, state: str, also: str = "", patience: float = 0.5) -> None:
        board = self._board
        if board is not None:
            text = self._notice(state, also).as_text()
            self._errands["notices"].run(lambda: board.post(text), patience)

    def _has(self, name: str) -> Callable[[], bool]:
        board = self._board
        return lambda: board is not None and board.has(name)

    def _ask(self, question: Callable[[], bool], patience: float) -> bool:
        return bool(self._errands["notices"].run(question, patience))

    def _state(self, notice: Notice) -> str | None:
        """The state of another rank's process that is on this machine."""
        if notice.host != self._host or notice.pid == self._pid:
            return None
        return process_state.state_of(notice.pid, notice.born)

    def _kill_stopped(self, notices: Iterable[Notice]) -> None:
        """Kill those of some ranks that a signal has stopped on this machine: they do not obey their launcher."""
        for notice in notices:
            if self._state(notice) == process_state.STOPPED:
                with contextlib.suppress(OSError):
                    os.kill(notice.pid, signal.SIGKILL)

    def _say(self, text: str) -> None:
        """Print on stderr, which may be a pipe that nobody reads."""
        self._errands["terminal"].run(lambda: print(text, file=sys.stderr, flush=True), 0.5)


@contextlib.contextmanager
def watching(
    limits: Limits, rank: int, world_size: int, run_folder: Path | None, rank_text: Callable[[], str] = str
) -> Iterator[None]:
    """Watch the progress of this process inside the block; nothing is done where no limit is set.

    Args:
        limits: of progress.
        rank: of this process.
        world_size: number of ranks.
        run_folder: takes reports; ``None`` without one.
        rank_text: says where the rank is in its parallel layout.
    """
    progress_marks.restart()
    if not limits.shortest:
        yield
        return
    watchdog, failure = Watchdog(limits, rank, world_size, run_folder, rank_text), None
    watchdog.start()
    try:
        yield
    except BaseException as error:
        # the other ranks raise most of these, too
        failure = None if isinstance(error, InputError) and not error.always else error
        raise
    finally:
        watchdog.stop(failure)
