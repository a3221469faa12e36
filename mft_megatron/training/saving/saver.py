"""Checkpoints of a run: when they are saved, and which are kept."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from mft_megatron.arguments.groups.checkpointing import CheckpointArguments
from mft_megatron.arguments.table import Arguments
from mft_megatron.data.chat_templates.trained_format import trained_format
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.disk_errors import explain
from mft_megatron.errors import InputError
from mft_megatron.exit_codes import STORAGE
from mft_megatron.mcore.checkpointing import checkpoint
from mft_megatron.mcore.checkpointing.writers.agreement import SaveError
from mft_megatron.mcore.checkpointing.writers.rehearsal import bytes_of_save, rehearse
from mft_megatron.mcore.parallel import process_groups
from mft_megatron.mcore.trainer import Trainer
from mft_megatron.run_folder.content import content_digest
from mft_megatron.run_folder.description import CheckpointInfo
from mft_megatron.run_folder.names import iteration_folder
from mft_megatron.run_folder.owner.owner import Owner
from mft_megatron.run_folder.publishing import remove_leftovers
from mft_megatron.run_folder.retention import not_kept, record_best, remove_checkpoint, superseded
from mft_megatron.training.events import event_record
from mft_megatron.training.progress import Progress
from mft_megatron.training.restarts.differences import options_of, versions
from mft_megatron.training.run_log import RunLog

from .attempts import LAST_WAITS, Attempts
from .data_order import model_vocab_size, order_version
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
        self._dataset = dataset
        self._exports = exports
        self._folder = None if arguments.checkpoint.save is None else Path(arguments.checkpoint.save)
        self._base, self._base_digest = _base_of_adapters(arguments)
        self._writer = checkpoint.Writer(arguments.checkpoint, arguments.saves_base, self._owner.refuse_if_lost)
        self._attempts = Attempts(arguments.checkpoint.save_interval)
        self._removal = Removal()
        # steps of checkpoints in the run folder that are of this run's past: all until where it resumed, and its own
        continues = arguments.resume is not None and arguments.in_own_folder and not arguments.weights_alone
        self._resumed = arguments.resume.info.iteration if arguments.resume is not None and continues else -1
        self._saved: set[int] = set()

    def of_this_run(self, step: int) -> bool:
        """Whether the checkpoint of ``step`` in the run folder is of this run's past.

        One of a step after that from which the run resumed may be of another one, until the run has saved it anew.
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
        info = self._info(progress, ending, best, evaluation_due=state.get("postponed", False))

        def when_complete() -> None:
            self._attempts.succeeded()
            self._saved.add(progress.step)
            seconds = round(time.perf_counter() - start, 3)
            also = {"best": True} if best and self._record_best(folder, progress, log) else {}
            log.write(event_record(progress, "save", path=str(path), seconds=seconds, **also))
            if self._exports is not None and self._to_export(progress.step):
                self._exports.add(path)
            if process_groups.is_main():
                self._remove_old(folder, best, progress, log)

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

    def _remove_old(self, folder: Path, best: bool, progress: Progress, log: RunLog) -> None:
        """Remove the checkpoints that are not to be kept now that a newer one is complete, on the main rank alone."""
        last, interval = self._arguments.checkpoint.keep_last, self._arguments.checkpoint.save_retain_interval
        options = [f"--keep-last {last}"] * (last is not None)
        options += [f"--save-retain-interval {interval}"] * (interval is not None)
        try:
            if best:
                self._remove(superseded(folder), "no longer the best checkpoint", progress, log)
            self._remove(not_kept(folder, last, interval), f"not kept by {' and '.join(options)}", progress, log)
        except (OSError, InputError) as error:  # the run goes on without it, and every other rank does
            log.print(f"{folder}: nothing is removed ({error})")

    def _remove(self, paths: Sequence[Path], reason: str, progress: Progress, log: RunLog) -> None:
        """Remove checkpoints; one that is still to be exported is removed with a later one."""
        waiting = self._exports.waiting if self._exports is not None else ()
        for path in (path for path in paths if path not in waiting):
            try:
                self._removal.add(path)
            except OSError as error:  # failing to delete an old checkpoint must not stop training
                log.print(f"{path} is {reason} and cannot be removed ({explain(error, path)}); remove it")
            else:
                log.write(event_record(progress, "remove", path=str(path), reason=reason))

    def _to_export(self, step: int) -> bool:
        interval = self._arguments.checkpoint.save_hf_interval
        return interval is not None and step % interval == 0

    def _asked_for(self, step: int, ending: bool) -> bool:
        interval = self._arguments.checkpoint.save_interval
        return ending or (interval is not None and step % interval == 0)

    def _info(self, progress: Progress, ending: bool, best: bool, evaluation_due: bool = False) -> CheckpointInfo:
        a, ledger = self._arguments, self._dataset.ledger
        trained = trained_format(ledger)
        return CheckpointInfo(
            iteration=progress.step,
            consumed_samples=progress.consumed_samples,
            skipped_steps=progress.skipped_steps,
            architecture=dataclasses.asdict(a.network),
            vocab_size=model_vocab_size(a, self._dataset),
            tokenizer={
                **dataclasses.asdict(ledger.tokenizer),
                "stop_token_ids": ledger.chat_template["stop_token_ids"],
                **({} if trained is None else {"chat_template": dataclasses.asdict(trained)}),
            },
            dataset_hash=self._dataset.dataset_hash,
            seed=a.initialization.seed,
            global_batch_size=a.training.global_batch_size,
            has_optimizer=a.checkpoint.save_optim,
            has_rng=a.checkpoint.save_rng,
            precision=a.precision.name,
            optimizer=a.optimizer_states,
            distributed_optimizer=a.distributed.use_distributed_optimizer,
            decoupled_lr=a.learning_rate.decoupled_lr is not None,
            layout=process_groups.parallel_layout(),
            best=best,
            asked_for=self._asked_for(progress.step, ending) or self._attempts.due(progress.step),
            source=a.resume.info.source if a.resume is not None else "",
            lora=a.adapters.as_dict() if a.adapters is not None else None,
            peft_type=a.lora.peft_type,
            has_base=a.saves_base,
            base=self._base,
            base_digest=self._base_digest,
            order_version=order_version(a, self._dataset),
            mft_normalization=a.multi_task.mft_normalization,
            options=options_of(a),
            versions=versions(),
            evaluation_due=evaluation_due,
        )


def _base_of_adapters(arguments: Arguments) -> tuple[str, str]:
    """The folder of the model that a run's adapters belong to, and its digest if checkpoints do not hold the model.

    Both are empty for a run without adapters, or with a model of its own.
    """
    if arguments.adapters is None or arguments.resume is None:
        return "", ""
    folder = os.path.abspath(arguments.base.path) if arguments.base is not None else arguments.resume.info.base
    return folder, "" if arguments.saves_base else content_digest(Path(folder))


def remove_exported(options: CheckpointArguments, spared: Collection[Path]) -> None:
    """Remove checkpoints that were kept only until their export, after the last one of a run, except ``spared``."""
    last, interval = options.keep_last, options.save_retain_interval
    if options.save is not None and options.save_hf_interval is not None:
        try:
            paths = not_kept(Path(options.save), last, interval)
        except InputError as error:  # likewise
            print(f"{options.save}: nothing is removed ({error})", flush=True)
            return
        for path in (path for path in paths if path not in spared):
            try:
                remove_checkpoint(path)
            except OSError as error:  # the run and its exports are complete
                print(f"{path} is exported and cannot be removed ({explain(error, path)}); remove it", flush=True)
