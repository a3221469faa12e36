"""Checkpoints of a run: when they are saved, and which are kept."""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from mft_megatron.arguments.table import Arguments
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.errors import InputError
from mft_megatron.exit_codes import STORAGE
from mft_megatron.mcore.checkpointing import checkpoint
from mft_megatron.mcore.checkpointing.writers.agreement import SaveError
from mft_megatron.mcore.checkpointing.writers.rehearsal import bytes_of_save, rehearse
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.trainer import Trainer
from mft_megatron.run_folder.names import iteration_folder
from mft_megatron.run_folder.owner.owner import Owner
from mft_megatron.run_folder.publishing import remove_leftovers
from mft_megatron.run_folder.retention import record_best
from mft_megatron.training.events import event_record
from mft_megatron.training.progress import Progress
from mft_megatron.training.run_log import RunLog

from .attempts import LAST_WAITS, Attempts
from .description import Describer
from .removal import Removal
from .run_state import RunState

# a save that takes longer may not be over 30 s after SIGTERM, when torchrun kills its ranks
SAFE_SECONDS = 20


class Exports(Protocol):
    """Exports of checkpoints during the run, on rank 0."""

    @property
    def waiting(self) -> Collection[Path]:
        """Checkpoints that are still to be exported, and must not be removed."""

    def add(self, checkpoint: Path) -> None:
        """Export a complete checkpoint after those that were added before."""

    def poll(self) -> Sequence[dict[str, str | float]]:
        """Report exports that have ended: the fields of the event "export", or of "export failed"."""


class Saver:
    """Checkpoints of a run in ``--save``; without it nothing is saved."""

    def __init__(
        self,
        arguments: Arguments,
        dataset: PackedDataset,
        exports: Exports | None = None,
        owner: Owner | None = None,
    ):
        """
        Args:
            arguments: of the run.
            dataset: that it trains on.
            exports: exports the checkpoints of ``--save-hf-interval``; on rank 0 only.
            owner: ownership of the run folder, which rank 0 has acquired; nothing is saved once it is lost.
        """
        self._owner = owner or Owner(arguments.checkpoint.save or ".")
        self._arguments = arguments
        self._exports = exports
        self._folder = None if arguments.checkpoint.save is None else Path(arguments.checkpoint.save)
        self._describer = Describer(arguments, dataset)
        self._writer = checkpoint.Writer(arguments.checkpoint, arguments.saves_base, self._owner.refuse_if_lost)
        self._attempts = Attempts(arguments.checkpoint.save_interval)
        self._removal = Removal(arguments.checkpoint)
        # steps of checkpoints in the run folder that are of this run's past: all until where it resumed, and its own
        continues = arguments.resume is not None and arguments.in_own_folder and not arguments.weights_alone
        self._resumed = arguments.resume.info.iteration if arguments.resume is not None and continues else -1
        self._saved: set[int] = set()

    def of_this_run(self, step: int) -> bool:
        """Whether the checkpoint of ``step`` in the run folder is of this run's past.

        One of a step after that from which the run resumed may be of another one, until the run has saved it again.
        """
        return step <= self._resumed or step in self._saved

    def go_back(self, step: int) -> None:
        """The run went back to ``step``: later checkpoints are no longer of its past."""
        self._resumed = min(self._resumed, step)
        self._saved = {saved for saved in self._saved if saved <= step}

    def rehearse(self, trainer: Trainer, log: RunLog) -> None:
        """Remove what dead jobs have left in the run folder, and measure what a save costs; a collective of all ranks.

        Args:
            trainer: that is to be saved.
            log: takes lines about both.

        Raises:
            InputError: a rank cannot write into the run folder; on every rank.
        """
        if self._folder is None:
            return
        left = remove_leftovers(self._folder) if process_groups.is_main() else []
        if left:
            names = ", ".join(path.name for path in left)
            log.print(f"{self._folder}: removed what a job that has ended left unfinished ({len(left)}): {names}")
        size = bytes_of_save(trainer)
        rehearsal = rehearse(self._folder, size, self._arguments.checkpoint.async_save)
        seconds = rehearsal.estimate(size)
        behind = " behind the training" if self._arguments.checkpoint.async_save else ""
        log.print(
            f"a save writes about {size / 1e6:,.0f} MB, in about {seconds:,.1f} s{behind}: "
            f"a rehearsal wrote {rehearsal.bytes / 1e6:,.1f} MB in {rehearsal.seconds:.3f} s"
        )
        if seconds > SAFE_SECONDS:
            log.print(
                f"note: torchrun ends its ranks 30 s after SIGTERM, and a save may take longer: let the job scheduler "
                f"send its signal {seconds + SAFE_SECONDS:,.0f} s before the end (docs/RELIABILITY.md)"
            )

    def due(self, step: int, ending: bool, best: bool = False) -> bool:
        """Whether to save after ``step``.

        Args:
            step: number of steps so far.
            ending: whether the run ends here.
            best: whether the step has the best evaluation so far, and the best checkpoint is to be kept.
        """
        return self._folder is not None and (best or self._asked_for(step, ending) or self._attempts.due(step))

    def save(
        self, trainer: Trainer, progress: Progress, log: RunLog, ending: bool, best: bool, state: RunState
    ) -> None:
        """Save a checkpoint that is :meth:`due`; with ``--async-save`` it is complete, and logged, only later.

        The best checkpoint is recorded when it is complete, and only then those that were saved for having been the
        best are removed; one that was asked for never is. A checkpoint that cannot be written leaves the one before
        the newest, and the run goes on: :mod:`.attempts` says until when. The last one of a run is waited for.

        Args:
            trainer: to be saved.
            progress: after the step.
            log: takes the events.
            ending: as in :meth:`due`.
            best: as in :meth:`due`.
            state: of the run, the same on every rank.

        Raises:
            InputError: the last checkpoint of the run, or several in a row, cannot be written; the weights are not
                finite; on every rank.
        """
        if self._folder is None:
            return
        start, folder = time.perf_counter(), self._folder
        path = iteration_folder(folder, progress.step)
        asked_for = self._asked_for(progress.step, ending) or self._attempts.due(progress.step)
        info = self._describer.describe(progress, best, asked_for, evaluation_due=state.get("postponed", False))

        def when_complete() -> None:
            self._attempts.succeeded()
            self._saved.add(progress.step)
            seconds = round(time.perf_counter() - start, 3)
            also = {"best": True} if best and self._record_best(folder, progress, log) else {}
            log.write(event_record(progress, "save", path=str(path), seconds=seconds, **also))
            if self._exports is not None and self._to_export(progress.step):
                self._exports.add(path)
            if process_groups.is_main():
                waiting = self._exports.waiting if self._exports is not None else ()
                self._removal.remove_old(folder, best, waiting, progress, log)

        def write() -> None:
            self._writer.save(folder, trainer, info, dict(state), when_complete)
            if ending:
                self._writer.finish()

        self._tried(self._writer.finish, progress, log)
        for wait in LAST_WAITS if ending else ():
            if self._tried(write, progress, log):
                return
            time.sleep(wait)
        self._tried(write, progress, log, last=ending)

    def poll(self, progress: Progress, log: RunLog) -> None:
        """Complete a checkpoint that has meanwhile been written in the background, and log exports that have ended.

        Raises:
            InputError: it cannot be written, and the run gives up; on every rank.
        """
        self._owner.refuse_if_doubted()
        self._tried(self._writer.poll, progress, log)
        for line in self._removal.problems():
            log.print(line)
        for details in self._exports.poll() if self._exports is not None else ():
            log.write(event_record(progress, "export failed" if "failed" in details else "export", **details))

    def complete(self, progress: Progress, log: RunLog) -> None:
        """Wait for a checkpoint that is being written in the background; one that fails counts, and the run goes on.

        Raises:
            InputError: it cannot be written, and the run gives up; on every rank.
        """
        self._tried(self._writer.finish, progress, log)

    def finish(self) -> None:
        """Wait for a checkpoint that is being written in the background, and complete it."""
        self._writer.finish()
        self._removal.finish()

    @contextlib.contextmanager
    def completed_first(self) -> Iterator[None]:
        """Complete a checkpoint that is being written in the background before an error ends the run.

        Not after an error that the other ranks may not have: completing is a collective.
        """
        try:
            yield
        except InputError as error:
            if not error.always:
                try:
                    self.finish()
                except SaveError as also:
                    raise InputError(f"{error}; and {also}", code=error.code) from also
            raise

    def _tried(self, write: Callable[[], None], progress: Progress, log: RunLog, last: bool = False) -> bool:
        """Write a checkpoint, or complete one; returns whether that did not fail, the same on every rank.

        Args:
            write: raises ``SaveError`` on every rank.
            progress: of the run now.
            log: takes the event.
            last: whether the run ends after this attempt.

        Raises:
            InputError: it fails, and nothing more is tried.
        """
        try:
            write()
        except SaveError as error:
            if last:
                raise InputError(f"{error}; it was the last of the run", code=STORAGE) from error
            self._attempts.failed(progress.step, str(error))
            details = {"failures": self._attempts.failures, "next": self._attempts.next}
            log.write(event_record(progress, "save failed", path=str(error.path), reason=str(error), **details))
            return False
        return True

    def _record_best(self, folder: Path, progress: Progress, log: RunLog) -> bool:
        """Record the checkpoint as the best; returns whether that was possible, the same on every rank."""
        consequence = "the checkpoint is complete, and not recorded as the best of the run"
        try:
            process_groups.write_on_main(folder, lambda: record_best(folder, progress.step), consequence)
        except InputError as error:
            log.print(str(error))
            return False
        return True

    def _to_export(self, step: int) -> bool:
        interval = self._arguments.checkpoint.save_hf_interval
        return interval is not None and step % interval == 0

    def _asked_for(self, step: int, ending: bool) -> bool:
        interval = self._arguments.checkpoint.save_interval
        return ending or (interval is not None and step % interval == 0)
