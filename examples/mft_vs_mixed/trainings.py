"""Runs of ``pretrain_mft.py``, some at a time; one that is complete is not repeated.

::

    runs/token-seed1/log.txt     the command's output
    runs/token-seed1/save/       its run folder, with metrics.jsonl
    runs/token-seed1/done.json   its command and inputs, written when it has succeeded
"""

import itertools
import json
import os
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mft_megatron.errors import InputError
from mft_megatron.run_folder import METRICS, replace_text


@dataclass(frozen=True)
class Training:
    """One run. ``inputs`` is any text that changes when what the command reads has changed."""

    name: str
    command: tuple[str, ...]
    folder: Path
    inputs: str

    @property
    def save(self) -> Path:
        """Its run folder."""
        return self.folder / "save"

    @property
    def log(self) -> Path:
        """Output of the command."""
        return self.folder / "log.txt"

    @property
    def metrics(self) -> Path:
        """Its run log."""
        return self.save / METRICS

    @property
    def receipt(self) -> dict[str, object]:
        """Command and inputs, which identify a complete run."""
        return {"command": list(self.command), "inputs": self.inputs}

    def is_complete(self) -> bool:
        """Whether the same command has succeeded on the same inputs."""
        try:
            return json.loads((self.folder / "done.json").read_text()) == self.receipt
        except (OSError, ValueError):
            return False

    def run(self, root: Path) -> float:
        """Run the command in ``root`` from the start and return its seconds.

        Raises:
            InputError: it failed; says where its log is.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        start = time.perf_counter()
        with self.log.open("w") as log:
            print(f"$ {shlex.join(self.command)}", file=log, flush=True)
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            code = subprocess.run(
                self.command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT
            ).returncode
        if code:
            raise InputError(f"{self.name} ended with exit code {code}: {_reason(self.log)}; see {self.log}")
        replace_text(self.folder / "done.json", json.dumps(self.receipt, indent=2) + "\n")
        return time.perf_counter() - start


def run_all(trainings: Sequence[Training], jobs: int, root: Path, say: Callable[[str], None]) -> None:
    """Run the incomplete ones, ``jobs`` at a time, in the order given; the first failure starts no further run.

    Raises:
        InputError: a run failed.
    """
    waiting = [training for training in trainings if not training.is_complete()]
    if len(waiting) < len(trainings):
        say(f"{len(trainings) - len(waiting)} of {len(trainings)} runs are complete already")
    failed, numbers = threading.Event(), itertools.count(1)

    def attempt(training: Training) -> None:
        if failed.is_set():
            return
        try:
            seconds = training.run(root)
        except BaseException:
            failed.set()  # before this thread takes the next run
            raise
        say(f"[{next(numbers)}/{len(waiting)}] {training.name}  {seconds:.0f} s")

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in [pool.submit(attempt, training) for training in waiting]:
                future.result()
        except BaseException:
            failed.set()
            raise


def _reason(log: Path) -> str:
    """The last error line of a log, or else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines)[-1].removeprefix("error: ")
