"""A run's checkpoints as Hugging Face folders while it goes on: one after the other, in a process beside it.

::

    a checkpoint is complete ─► add ─► in turn ─► tools/convert_checkpoint.py … ─► poll says that it is done
                                                       end of the run: the newest one, too ─► all are waited for

Only rank 0 has these, and no rank waits for them while it trains: an export takes as long as it takes, and collectives
have a time limit.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import IO, Any

from mft_megatron.convert.commands.convert import main
from mft_megatron.errors import InputError
from mft_megatron.run_folder import INFO, iteration_folder, latest_checkpoint, read_info

# what makes a process one of torchrun's ranks
_RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


class Exports:
    """``--save-hf DIR``: checkpoints become ``DIR/iter_NNNNNNN``.

    Within ``with``: at its end everything that was added is waited for, unless the run is interrupted. After it
    :meth:`refuse_failures`.
    """

    def __init__(self, target: Path, program: Path, direction: str):
        """
        Args:
            target: folder of the exports; one that is there already stays as it is.
            program: ``tools/convert_checkpoint.py``.
            direction: its first word, which takes ``--load`` and ``--hf``.
        """
        self._target, self._program, self._direction = target, program, direction
        self._queue: deque[Path] = deque()
        self._now: tuple[Path, subprocess.Popen, IO[str], float] | None = None
        self._failed: dict[Path, str] = {}

    @property
    def waiting(self) -> tuple[Path, ...]:
        """Checkpoints that are still needed: the one that is being exported, those after it, and what could not be."""
        return (*self._failed, *((self._now[0],) if self._now is not None else ()), *self._queue)

    def add(self, checkpoint: Path) -> None:
        """Export a complete checkpoint, as soon as those before it are done."""
        self._queue.append(checkpoint)
        if self._now is None:
            self._begin()

    def catch_up(self, run: Path, interval: int, resumed: Path) -> None:
        """Add what a job before this one saved and was ended before it had exported.

        Args:
            run: folder of the run.
            interval: iterations divisible by this are exported.
            resumed: checkpoint that this job goes on from; later ones will be saved again, and nothing is added where
                it is of another run.
        """
        if resumed.resolve().parent != run.resolve():
            return
        for iteration in range(interval, read_info(resumed).iteration + 1, interval):
            path = iteration_folder(run, iteration)
            if (path / INFO).is_file() and not self._folder(path).exists():
                self.add(path)

    def poll(self) -> list[dict[str, Any]]:
        """What has ended since the last call: the folder with its seconds, or the reason why it failed."""
        if self._now is None or self._now[1].poll() is None:
            return []
        return [self._end()]

    def export_newest(self, run: Path) -> None:
        """Export the newest checkpoint of a run, in this process."""
        checkpoint = latest_checkpoint(run, "--save").path
        if checkpoint in self.waiting:
            return
        if self._folder(checkpoint).exists():
            print(f"--save-hf: {self._folder(checkpoint)} is there already", flush=True)
            return
        main(self._words(checkpoint))

    def __enter__(self) -> "Exports":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None and not issubclass(kind, InputError):
            self._stop()
            return
        if self._now is not None:
            names = ", ".join(path.name for path in (self._now[0], *self._queue))
            print(f"--save-hf: waiting for {names}", flush=True)
        while self._now is not None:
            self._now[1].wait()
            print("--save-hf: " + ", ".join(f"{name} {value}" for name, value in self._end().items()), flush=True)

    def refuse_failures(self) -> None:
        """
        Raises:
            InputError: an export failed; with what does it by hand.
        """
        if self._failed:
            raise InputError("--save-hf: " + "; ".join(self._failed.values()))

    def _folder(self, checkpoint: Path) -> Path:
        return self._target / checkpoint.name

    def _words(self, checkpoint: Path) -> list[str]:
        return [self._direction, "--load", str(checkpoint), "--hf", str(self._folder(checkpoint))]

    def _begin(self) -> None:
        checkpoint = self._queue.popleft()
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as the process)
        # one process without a device
        environment = {name: value for name, value in os.environ.items() if name not in _RANKS}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        process = subprocess.Popen(
            [sys.executable, str(self._program), *self._words(checkpoint)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        self._now = checkpoint, process, output, time.perf_counter()

    def _end(self) -> dict[str, Any]:
        """Take leave of the process, which has ended, and begin the next; what became of its export."""
        checkpoint, process, output, start = self._now
        self._now = None
        output.seek(0)
        lines = [line.strip() for line in output if line.strip()]
        output.close()
        if self._queue:
            self._begin()
        if process.returncode == 0:
            return {"path": str(self._folder(checkpoint)), "seconds": round(time.perf_counter() - start, 3)}
        said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
        reason = said.removeprefix("error: ") or f"exit code {process.returncode}"
        by_hand = f"{self._program.name} {' '.join(self._words(checkpoint))}"
        self._failed[checkpoint] = f"{checkpoint} was not exported ({reason}); later {by_hand} will do it"
        return {"path": str(self._folder(checkpoint)), "failed": reason}

    def _stop(self) -> None:
        """End what is being exported; it leaves nothing behind where it can help it."""
        self._queue.clear()
        if self._now is None:
            return
        process = self._now[1]
        # not an interrupt, which processes started in the background of a shell do not hear
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
