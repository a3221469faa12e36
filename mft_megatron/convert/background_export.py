"""Export of a run's checkpoints as Hugging Face folders during the run: one after the other, in a separate process.

::

    a checkpoint is complete ─► add ─► queue ─► tools/convert_checkpoint.py … ─► poll returns the result
                                                     end of the run: the newest one is added ─► all are waited for

Only rank 0 exports, and no rank waits for it during training: an export takes long, and collectives have a time limit.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import IO

from mft_megatron import parent_process
from mft_megatron.convert.commands.convert import main
from mft_megatron.disk_errors import explain
from mft_megatron.errors import InputError
from mft_megatron.run_folder.description import read_info
from mft_megatron.run_folder.found import latest_checkpoint
from mft_megatron.run_folder.names import INFO, iteration_folder

# environment variables that make a process one of torchrun's ranks
_RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
# the time that an interrupted export has to remove its unfinished folder
_STOP_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class _Running:
    """The export in progress; ``output``: everything that the process has printed; ``start``: seconds."""

    checkpoint: Path
    process: subprocess.Popen[str]
    output: IO[str]
    start: float


class Exports:
    """Exports of ``--save-hf DIR``: checkpoints become ``DIR/iter_NNNNNNN``.

    A context manager: at its end all exports are waited for, unless the run was interrupted. Call
    :meth:`refuse_failures` afterwards.
    """

    def __init__(self, target: Path, program: Path, direction: str):
        """Prepare exports; nothing is started.

        Args:
            target: folder of the exports; an export that exists there is not written again.
            program: ``tools/convert_checkpoint.py``.
            direction: first word of its command line: one that takes ``--load`` and ``--hf``.
        """
        self._target, self._program, self._direction = target, program, direction
        self._queue: deque[Path] = deque()
        self._running: _Running | None = None
        self._failed: dict[Path, str] = {}
        self._printed: set[str] = set()
        self._not_started: list[dict[str, str | float]] = []

    @property
    def waiting(self) -> tuple[Path, ...]:
        """Checkpoints that must not be removed: those whose export failed, is in progress, or is queued."""
        running = () if self._running is None else (self._running.checkpoint,)
        return (*self._failed, *running, *self._queue)

    def add(self, checkpoint: Path) -> None:
        """Export a complete checkpoint after those that were added before."""
        self._queue.append(checkpoint)
        if self._running is None:
            self._begin()

    def catch_up(self, run: Path, interval: int, resumed: Path) -> None:
        """Add checkpoints that an earlier job saved and did not export before it ended.

        Args:
            run: folder of the run.
            interval: iterations divisible by this are exported.
            resumed: checkpoint that this job resumes from. Later ones will be saved again; if it is of another run,
                nothing is added.
        """
        if resumed.resolve().parent != run.resolve():
            return
        for iteration in range(interval, read_info(resumed).iteration + 1, interval):
            path = iteration_folder(run, iteration)
            if (path / INFO).is_file() and not self._folder(path).exists():
                self.add(path)

    def poll(self) -> list[dict[str, str | float]]:
        """Report exports that have ended since the last call: ``path``, and ``seconds`` or the reason it ``failed``."""
        ended = [] if self._running is None or self._running.process.poll() is None else [self._end(self._running)]
        not_started, self._not_started = self._not_started, []
        return ended + not_started

    def export_newest(self, run: Path) -> None:
        """Export the newest checkpoint of a run in this process, unless it is exported or waiting already."""
        checkpoint = latest_checkpoint(run, "--save").path
        if checkpoint in self.waiting:
            return
        if self._folder(checkpoint).exists():
            print(f"--save-hf: {self._folder(checkpoint)} is there already", flush=True)
            return
        main(self._command(checkpoint))

    def __enter__(self) -> "Exports":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None and not issubclass(kind, InputError):
            self._stop()
            return
        if self._running is not None:
            names = ", ".join(path.name for path in (self._running.checkpoint, *self._queue))
            print(f"--save-hf: waiting for {names}", flush=True)
        try:
            while self._running is not None:
                self._running.process.wait()
                for result in (self._end(self._running), *self.poll()):
                    print("--save-hf: " + ", ".join(f"{name} {value}" for name, value in result.items()), flush=True)
        except BaseException:  # a signal
            self._stop()
            raise

    def refuse_failures(self) -> None:
        """Report the exports that failed.

        Raises:
            InputError: an export failed; the message has the command that repeats it.
        """
        if self._failed:
            raise InputError("--save-hf: " + "; ".join(self._failed.values()))

    def _folder(self, checkpoint: Path) -> Path:
        return self._target / checkpoint.name

    def _command(self, checkpoint: Path) -> list[str]:
        return [self._direction, "--load", str(checkpoint), "--hf", str(self._folder(checkpoint))]

    def _begin(self) -> None:
        """Start the first export of the queue that can be started."""
        while self._queue and self._running is None:
            checkpoint = self._queue.popleft()
            try:
                self._start(checkpoint)
            except OSError as error:  # no space for its output, no process: that ends the export and not the run
                reason = explain(error, tempfile.gettempdir() if error.filename is None else error.filename)
                self._not_started.append(self._failure(checkpoint, reason))

    def _start(self, checkpoint: Path) -> None:
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as the process)
        # the export is a single process without a device
        environment = {name: value for name, value in os.environ.items() if name not in _RANKS}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        process = subprocess.Popen(
            [sys.executable, str(self._program), *self._command(checkpoint)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=parent_process.told_to_end_with_this(environment),
            text=True,
        )
        self._running = _Running(checkpoint, process, output, time.perf_counter())

    def _end(self, ended: _Running) -> dict[str, str | float]:
        """Reap the finished process, start the next export, and return the result of the finished one."""
        self._running = None
        ended.output.seek(0)
        lines = [line.strip() for line in ended.output if line.strip()]
        ended.output.close()
        if self._queue:
            self._begin()
        path, code = str(self._folder(ended.checkpoint)), ended.process.returncode
        if code == 0:
            notes = [line for line in lines if line.startswith("note: ") and line not in self._printed]
            for line in notes:
                print(f"--save-hf: {line}", flush=True)
            self._printed.update(notes)
            return {"path": path, "seconds": round(time.perf_counter() - ended.start, 3)}
        errors = [line for line in lines if line.startswith("error: ")]
        others = [line for line in lines if not line.startswith("warning: ")]
        reason = (errors or others or [""])[-1].removeprefix("error: ") or f"exit code {code}"
        return self._failure(ended.checkpoint, reason)

    def _failure(self, checkpoint: Path, reason: str) -> dict[str, str | float]:
        command = f"{self._program.name} {' '.join(self._command(checkpoint))}"
        self._failed[checkpoint] = f"{checkpoint} was not exported ({reason}); later {command} will do it"
        return {"path": str(self._folder(checkpoint)), "failed": reason}

    def _stop(self) -> None:
        """End the export in progress, which removes its unfinished folder; kill it if it does not end in time."""
        self._queue.clear()
        if self._running is None:
            return
        process = self._running.process
        # background processes of a shell ignore interrupts, so this is a termination
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
