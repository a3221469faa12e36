"""A process that has imported torch and starts jobs: forked ones at once, others as a user would.

::

    stdin: a request as a line of JSON ─► fork ─► launcher ─► a rank each        stdout: {"pid": …}, later {"ended": …}

A forked job runs a script as the main module, from its command line to the end of its interpreter. Only the imports of
torch and Megatron-Core are already done. Its launcher does what torchrun does: it starts the ranks, and when one fails,
it terminates the others, kills those that do not end, and fails. All processes of a job are below this one, also those
whose parents were killed.
"""

import contextlib
import functools
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults import processes

ROOT = Path(__file__).parent.parent.parent
# seconds that torchrun gives ranks to end
GRACE = 30


def main() -> Callable[[], None] | None:
    """Serve requests until stdin is closed; returns, in a child alone, what that child has to do."""
    processes.adopt_orphans()
    # also where the harness is told to end, nothing of a job may be left
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    import torch
    import torch._dynamo  # imported by the first optimizer otherwise

    import mft_megatron.training.pretrain  # noqa: F401

    torch.set_num_threads(1)
    wakeup, wakeup_writer = os.pipe()
    os.set_blocking(wakeup_writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup_writer)
    _answer(ready=True)
    requests = sys.stdin.fileno()
    while True:
        ready, _, _ = select.select([requests, wakeup], [], [])
        if wakeup in ready:
            os.read(wakeup, 4096)
            _reap()
        if requests in ready:
            line = sys.stdin.readline()
            if not line:
                while left := processes.descendants(os.getpid()):
                    processes.kill(left)
                    _reap()
                return None
            request = json.loads(line)
            action = _digest if "digest" in request else _launch
            if not request["forked"]:
                _start(request)
            elif _fork(request["output"]):
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.close(wakeup), os.close(wakeup_writer)
                return functools.partial(action, request)


def _answer(**content: object) -> None:
    print(json.dumps(content), flush=True)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process == 0:
                return
            _answer(ended=process, code=os.waitstatus_to_exitcode(status))


def _fork(output: str) -> bool:
    """Fork a process with a session of its own that prints into the file ``output``; returns whether this is it."""
    process = os.fork()
    if process:
        _answer(pid=process)
        return False
    os.setsid()
    _redirect(output)
    return True


def _redirect(output: str) -> None:
    """Read from nothing, and append both streams to the file ``output``."""
    sys.stdin = open(os.devnull)  # noqa: SIM115  (as long as the process)
    os.dup2(sys.stdin.fileno(), 0)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1), os.dup2(file, 2)
    os.close(file)


def _start(request: dict) -> None:
    """Start a job as a user would, in processes that import everything themselves."""
    with open(request["output"], "ab") as output:
        process = subprocess.Popen(
            request["command"],
            cwd=ROOT,
            env={**os.environ, **request["environment"]},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_answer_signals,  # this process has one thread
        )
    _answer(pid=process.pid)


def _answer_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def _launch(request: dict) -> None:
    """Run the script of a request, by itself or on ranks."""
    os.environ.update(request["environment"])
    if request["ranks"] is None:
        return _run(request)
    ranks: dict[int, int] = {}
    for rank in range(request["ranks"]):
        process = os.fork()
        if not process:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(request["ranks"]),
                LOCAL_WORLD_SIZE=str(request["ranks"]),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(request["port"]),
            )
            return _run(request)
        ranks[process] = rank
    os._exit(_wait_for(ranks))


def _wait_for(ranks: dict[int, int]) -> int:
    """Wait for the ranks as torchrun does; returns the exit code of the first that failed, as a shell shows it."""
    failed, deadline = 0, None
    while ranks:
        process, status = os.waitpid(-1, 0 if deadline is None else os.WNOHANG)
        if process in ranks:
            del ranks[process]
            code = os.waitstatus_to_exitcode(status)
            if code and not failed:
                failed, deadline = code if code > 0 else 128 - code, time.monotonic() + GRACE
                processes.kill(list(ranks), signal.SIGTERM)
        elif deadline is not None:
            time.sleep(0.01)
            if time.monotonic() > deadline:
                processes.kill(list(ranks))
    return failed


def _run(request: dict) -> None:
    os.chdir(ROOT)
    script, *words = request["command"]
    sys.argv = [script, *words]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def _digest(request: dict) -> None:
    from tests.faults.comparison import digests

    Path(request["result"]).write_text(json.dumps(digests(Path(request["digest"]))))


if __name__ == "__main__":
    # children return here too, so that their interpreters end as any other does
    then = main()
    if then is not None:
        then()
