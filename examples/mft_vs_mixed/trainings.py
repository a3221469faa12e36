"""Runs of the product's commands, some at a time; one that is complete is not repeated.

::

    runs/epoch-seed1/log.txt     the command's output
    runs/epoch-seed1/save/       its run folder, with metrics.jsonl
    runs/epoch-seed1/done.json   its command and inputs, written when it has succeeded

Each run is a process of its own, forked from one that has imported torch and Megatron-Core: 3 s less for each of some
two hundred processes.
"""

import itertools
import json
import multiprocessing
import os
import resource
import runpy
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from mft_megatron import parent_process
from mft_megatron.errors import InputError
from mft_megatron.run_folder.names import METRICS
from mft_megatron.run_folder.replace_text import replace_text

os.environ["OMP_NUM_THREADS"] = "1"  # before the process that is forked imports torch
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["mft_megatron.training.pretrain"])


@dataclass(frozen=True)
class Training:
    """One run.

    Attributes:
        name: for messages.
        command: an interpreter, a script and its arguments.
        folder: for everything that the run leaves behind.
        inputs: any text that changes when what the command reads has changed.
    """

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
        return {name: self._done().get(name) for name in self.receipt} == self.receipt

    def cpu_seconds(self) -> float:
        """Processor time of the run, which is complete."""
        return float(self._done()["cpu_seconds"])

    def run(self, root: Path) -> float:
        """Run the command in ``root`` from the start and return its seconds.

        Raises:
            InputError: it failed; says where its log is.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        start = time.perf_counter()
        self.log.write_text(f"$ {shlex.join(self.command)}\n")
        receiver, sender = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=_run_script, args=(self.command[1:], root, self.log, sender))
        process.start()
        sender.close()
        process.join()
        if process.exitcode:
            raise InputError(
                f"{self.name} ended with exit code {process.exitcode}: {_reason(self.log)}; see {self.log}"
            )
        done = {**self.receipt, "cpu_seconds": receiver.recv()}
        replace_text(self.folder / "done.json", json.dumps(done, indent=2) + "\n")
        return time.perf_counter() - start

    def _done(self) -> dict[str, object]:
        """The receipt of the last run that succeeded, with its processor time; empty if there was none."""
        try:
            return json.loads((self.folder / "done.json").read_text())
        except (OSError, ValueError):
            return {}


def _run_script(words: Sequence[str], root: Path, log: Path, seconds: Connection) -> None:
    """Run a script with its words as if the interpreter had been started with them.

    Args:
        words: the script and its arguments.
        root: working directory.
        log: where its output is appended.
        seconds: receives its processor time, with that of its children.
    """
    parent_process.end_with_parent()
    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(root)
    sys.argv = list(words)
    sys.path[0] = str(Path(words[0]).parent)
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        seconds.send(sum(usage.ru_utime + usage.ru_stime for usage in usages))


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
