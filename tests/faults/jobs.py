"""Jobs of the harness: started through a fork server of their own, watched by their output, and killed."""

import contextlib
import dataclasses
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.faults import processes
from tests.faults.fork_server import ROOT
from tests.ranks import reserved_ports

# "step 3 | loss 5.1 | …", "step 4 | save | path …", with the clock before it
LINE = re.compile(r"\[\d\d:\d\d:\d\d\] step (\d+) \| (\w+)")
# seconds after which a job counts as hanging: the machine may be busy with other things
PATIENCE = 300


@dataclasses.dataclass(frozen=True)
class Command:
    """A command as a user types it.

    Attributes:
        script: path in the repository.
        words: its command line.
        ranks: number of ranks; ``None`` for a process by itself.
        forked: from the fork server; otherwise by torchrun or python, in processes that import everything themselves.
        restarts: ``--max-restarts`` of torchrun.
    """

    script: str
    words: tuple[str, ...]
    ranks: int | None = None
    forked: bool = True
    restarts: int = 0

    def as_words(self) -> list[str]:
        """Words to be executed by a shell."""
        start = []
        if self.ranks is not None:
            start = f"-m torch.distributed.run --standalone --nproc-per-node={self.ranks}".split()
            start += [f"--max-restarts={self.restarts}"] * bool(self.restarts)
        return [sys.executable, *start, self.script, *self.words]


@dataclasses.dataclass(frozen=True)
class Mark:
    """A line of a job's output that shows how far it is.

    Attributes:
        step: of the run.
        kind: "loss" of a step that is over, "validation", "save" of a complete checkpoint, "load", "launch" or "exit".
        seconds: since the launch.
    """

    step: int
    kind: str
    seconds: float


class Job:
    """A running job.

    Attributes:
        pid: the launcher, or the only process.
        has_ranks: whether the children of ``pid`` are ranks.
        marks: those seen so far, the launch first.
    """

    def __init__(self, server: "Server", pid: int, output: Path, has_ranks: bool = False):
        """
        Args:
            server: that started it.
            pid: the launcher, or the only process.
            output: file of its output, which may have that of earlier jobs.
            has_ranks: whether ``pid`` is a launcher.
        """
        self._server, self.pid, self._output, self.has_ranks = server, pid, output, has_ranks
        self._read = output.stat().st_size if output.exists() else 0
        self._rest = ""
        self._start = time.monotonic()
        self.marks = [Mark(0, "launch", 0.0)]

    @property
    def code(self) -> int | None:
        """The exit code; ``None`` while the job runs."""
        return self._server.codes().get(self.pid)

    @property
    def seconds(self) -> float:
        """Seconds since the launch."""
        return time.monotonic() - self._start

    def poll(self) -> None:
        """Read new lines of the output."""
        with contextlib.suppress(FileNotFoundError), open(self._output, "rb") as file:
            file.seek(self._read)
            new = file.read()
            self._read += len(new)
            *lines, self._rest = (self._rest + new.decode(errors="replace")).split("\n")
            found = filter(None, map(LINE.match, lines))
            self.marks += [Mark(int(match[1]), match[2], self.seconds) for match in found]

    def wait(self, patience: float = PATIENCE) -> int | None:
        """Wait for the end; returns the exit code, or ``None`` if there is none in time."""
        while self.code is None and self.seconds < patience:
            self.poll()
            time.sleep(0.005)
        self.poll()
        if self.code is not None:
            self.marks.append(Mark(self.marks[-1].step, "exit", self.seconds))
        return self.code

    def wait_for(self, step: int, kind: str, delay: float) -> bool:
        """Wait for a mark and then ``delay`` seconds; returns whether the job still runs."""
        while self.code is None and self.seconds < PATIENCE:
            self.poll()
            mark = next((mark for mark in self.marks if (mark.step, mark.kind) == (step, kind)), None)
            if mark is not None:
                time.sleep(max(0.0, mark.seconds + delay - self.seconds))
                return self.code is None
            time.sleep(0.002)
        return False


class Server:
    """A fork server; every process of its jobs is below it."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.fork_server"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answers: queue.Queue[dict] = queue.Queue()
        self._codes: dict[int, int] = {}
        threading.Thread(target=self._listen, daemon=True).start()
        self._answer()

    @property
    def pid(self) -> int:
        """The process itself."""
        return self._process.pid

    def codes(self) -> dict[int, int]:
        """Exit codes of processes that have ended, negative after a signal."""
        return self._codes

    @contextlib.contextmanager
    def started(self, command: Command, output: Path) -> Iterator[Job]:
        """Start a job; everything that is left of it at the end of the block is killed."""
        with reserved_ports(1) as (port,):
            request = {
                "forked": command.forked,
                "command": [command.script, *command.words] if command.forked else command.as_words(),
                "ranks": command.ranks,
                "port": port,
                "output": str(output),
                "environment": {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            }
            job = Job(self, self._ask(request), output, command.ranks is not None)
            try:
                yield job
            finally:
                self.clear()

    def clear(self) -> None:
        """Kill everything below the server."""
        while left := processes.descendants(self.pid):
            processes.kill(left)
            time.sleep(0.01)

    def digests(self, run_folder: Path, result: Path) -> dict:
        """Call ``comparison.digests`` on a run folder, in a process that has torch."""
        output = result.with_suffix(".digest")
        request = {"forked": True, "digest": str(run_folder), "result": str(result), "output": str(output)}
        job = Job(self, self._ask(request), output)
        code = job.wait()
        if code:
            raise RuntimeError(f"{run_folder} cannot be read: {_end_of(output)}")
        return json.loads(result.read_text())

    def close(self) -> None:
        """End the server, with everything below it."""
        self.clear()
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, request: dict) -> int:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()["pid"]

    def _answer(self) -> dict:
        try:
            return self._answers.get(timeout=PATIENCE)
        except queue.Empty:
            raise RuntimeError("the fork server does not answer") from None

    def _listen(self) -> None:
        for line in self._process.stdout:
            answer = json.loads(line)
            if "ended" in answer:
                self._codes[answer["ended"]] = answer["code"]
            else:
                self._answers.put(answer)


@contextlib.contextmanager
def fork_server() -> Iterator[Server]:
    """A server that ends with the block."""
    server = Server()
    try:
        yield server
    finally:
        server.close()


def run(server: Server, command: Command, output: Path) -> Sequence[Mark]:
    """Run a job to its end, which must be a success; returns its marks."""
    with server.started(command, output) as job:
        code = job.wait()
        if code != 0:
            raise RuntimeError(f"{command.script} {' '.join(command.words)}: exit code {code}: {_end_of(output)}")
        return job.marks


def _end_of(output: Path) -> str:
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(line[:300] for line in lines[-5:])
