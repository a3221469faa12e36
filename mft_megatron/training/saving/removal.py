"""Checkpoints are removed behind a run: the files of a large one take minutes, and no rank waits for a disk."""

import shutil
import threading
from collections import deque
from collections.abc import Collection, Sequence
from pathlib import Path

from mft_megatron.arguments.groups.checkpointing import CheckpointArguments
from mft_megatron.disk_errors import explain
from mft_megatron.errors import InputError
from mft_megatron.run_folder.publishing import set_aside
from mft_megatron.run_folder.retention import not_kept, remove_checkpoint, superseded
from mft_megatron.training.events import event_record
from mft_megatron.training.progress import Progress
from mft_megatron.training.run_log import RunLog


class Removal:
    """Removes the checkpoints of a run that are not to be kept, one after the other, in a thread that ends with it."""

    def __init__(self, options: CheckpointArguments):
        self._options = options
        self._waiting: deque[Path] = deque()
        self._thread: threading.Thread | None = None
        self._problems: deque[str] = deque()

    def remove_old(self, folder: Path, best: bool, waiting: Collection[Path], progress: Progress, log: RunLog) -> None:
        """Remove the checkpoints that are not to be kept now that a newer one is complete, on the main rank alone.

        Args:
            folder: the run folder.
            best: whether the newer one is the best, so that others which were need not be kept.
            waiting: checkpoints that are still to be exported; they are removed with a later one.
            progress: of the run now.
            log: takes the events.
        """
        last, interval = self._options.keep_last, self._options.save_retain_interval
        options = [f"--keep-last {last}"] * (last is not None)
        options += [f"--save-retain-interval {interval}"] * (interval is not None)

        def remove(paths: Sequence[Path], reason: str) -> None:
            for path in (path for path in paths if path not in waiting):
                try:
                    self._add(path)
                except OSError as error:  # failing to delete an old checkpoint must not stop training
                    log.print(f"{path} is {reason} and cannot be removed ({explain(error, path)}); remove it")
                else:
                    log.write(event_record(progress, "remove", path=str(path), reason=reason))

        try:
            if best:
                remove(superseded(folder), "no longer the best checkpoint")
            remove(not_kept(folder, last, interval), f"not kept by {' and '.join(options)}")
        except (OSError, InputError) as error:  # the run goes on without it, and every other rank does
            log.print(f"{folder}: nothing is removed ({error})")

    def _add(self, checkpoint: Path) -> None:
        """Remove a checkpoint, which is none any more when this returns, and its files later.

        What is not removed when the process ends is a leftover, and removed when the run starts again.

        Raises:
            OSError: it cannot be renamed, and is still a checkpoint.
        """
        self._waiting.append(set_aside(checkpoint))
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._remove, name="removal of checkpoints", daemon=True)
            self._thread.start()

    def problems(self) -> list[str]:
        """Lines about files that could not be removed since the last call."""
        return [self._problems.popleft() for _ in range(len(self._problems))]

    def finish(self) -> None:
        """Wait until all that was added is removed."""
        while self._thread is not None:
            self._thread.join()
            self._thread = None
            self._remove()  # what was added while the thread ended

    def _remove(self) -> None:
        while self._waiting:
            folder = self._waiting.popleft()
            try:
                shutil.rmtree(folder)
            except OSError as error:
                self._problems.append(f"{folder} cannot be removed ({explain(error, folder)}); remove it")


def remove_exported(options: CheckpointArguments, spared: Collection[Path]) -> None:
    """Remove checkpoints that were kept only until their export, after the last one of a run, except ``spared``."""
    last, interval = options.keep_last, options.save_retain_interval
    if options.save is not None and options.save_hf_interval is not None:
        try:
            paths = not_kept(Path(options.save), last, interval)
        except InputError as error:  # the run and its exports are complete, too
            print(f"{options.save}: nothing is removed ({error})", flush=True)
            return
        for path in (path for path in paths if path not in spared):
            try:
                remove_checkpoint(path)
            except OSError as error:  # the run and its exports are complete
                print(f"{path} is exported and cannot be removed ({explain(error, path)}); remove it", flush=True)
