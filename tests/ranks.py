"""Running functions on several gloo ranks, and the project's commands, from plain pytest.

The ranks are forked from a server that has imported torch and Megatron-Core once, so that a case costs its own work and
not eight imports. Commands are run as a user runs them where that is what a test is about, or else forked as well.
"""

import functools
import multiprocessing
import os
import pickle
import queue
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

_context = multiprocessing.get_context("forkserver")
# torch imports its compiler when the first optimizer is made, half a second on each rank
_context.set_forkserver_preload(["mft_megatron.training.pretrain", "torch._dynamo"])


class _Results:
    """A queue for one thing at a time, between a process and those that it forks."""

    def __init__(self):
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (lives as long as the process)

    def put(self, thing):
        self._file.write(pickle.dumps(thing))

    def get_nowait(self):
        self._file.seek(0)
        content = self._file.read()
        self._file.seek(0)
        self._file.truncate()
        if not content:
            raise queue.Empty
        return pickle.loads(content)


def _ready_forked_process():
    """One thread; and no process of its own for each rank that saves.

    Megatron-Core's writer would hand over what was written through one that imports torch: two seconds on each rank.
    """
    import torch
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    filesystem_async._get_write_results_queue = functools.cache(_Results)


def _be_rank(rank, world_size, port):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def _rank_main(pipe, rank, world_size, port, function, arguments):
    _be_rank(rank, world_size, port)
    try:
        _ready_forked_process()
        pipe.send_bytes(pickle.dumps((True, function(*arguments))))  # tensors by value, not by file handle
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        pipe.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_on_ranks(world_size, function, *arguments, timeout=180):
    """Call ``function(*arguments)`` on ``world_size`` ranks; its results, by rank.

    ``function`` is a module-level function and starts the process groups itself. A rank that fails fails the test with
    its traceback; the others are ended. Where another process took the port meanwhile all begin anew with another one:
    nothing has happened before the process groups stand.
    """
    for _ in range(4):
        try:
            return _run_on_ranks(world_size, free_port(), function, arguments, timeout)
        except _PortTakenError:
            pass
    pytest.fail("another process took the port of rank 0, four times in a row")


class _PortTakenError(Exception):
    """Rank 0 cannot listen."""


def _run_on_ranks(world_size, port, function, arguments, timeout):
    ranks = []
    for rank in range(world_size):
        here, there = _context.Pipe(duplex=False)
        process = _context.Process(target=_rank_main, args=(there, rank, world_size, port, function, arguments))
        process.start()
        there.close()
        ranks.append((process, here))
    try:
        results = [None] * world_size
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(ranks)}
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), timeout)
            if not ready:
                pytest.fail(f"ranks {sorted(waiting.values())} gave no result within {timeout} s")
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    succeeded, results[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    pytest.fail(f"rank {rank} of {world_size} died without a word")
                if not succeeded and "EADDRINUSE" in results[rank]:
                    raise _PortTakenError
                if not succeeded:
                    pytest.fail(f"rank {rank} of {world_size}:\n{results[rank]}")
        for process, _ in ranks:
            process.join(30)
        return results
    finally:
        for process, _ in ranks:
            if process.is_alive():
                process.kill()


def run_tool(*command, **options):
    """Run one of the project's commands as a user would; the completed process, with its output as text."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, **options
    )


def _script_main(script, words, streams, place):
    for stream, path in zip((sys.stdout, sys.stderr), streams, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream.fileno())
        os.close(file)
    if place is not None:
        _be_rank(*place)
    _ready_forked_process()
    os.chdir(ROOT)
    sys.argv = [script, *words]
    runpy.run_path(str(ROOT / script), run_name="__main__")  # leaves with sys.exit


def run_forked(script, *words, world_size=None, timeout=300):
    """As :func:`run_tool`, but forked from the server of the ranks, which spares three seconds of imports.

    The script runs as the main module, from its command line to its exit code; with ``world_size`` on so many ranks, as
    :func:`torchrun` would. What it does not show is that a process of its own finds and imports what it needs: of each
    script, other tests show that with :func:`run_tool` and :func:`torchrun`.
    """
    command = [str(script), *map(str, words)]
    for _ in range(4):
        completed = _run_forked(command, world_size, timeout)
        if completed.returncode == 0 or "EADDRINUSE" not in completed.stderr:
            return completed
    pytest.fail("another process took the port of rank 0, four times in a row")


def _run_forked(command, world_size, timeout):
    port, ranks = free_port(), []
    with tempfile.TemporaryDirectory() as folder:
        outputs, errors = ([Path(folder) / f"{name}{rank}" for rank in range(world_size or 1)] for name in "oe")
        for rank, streams in enumerate(zip(outputs, errors, strict=True)):
            place = None if world_size is None else (rank, world_size, port)
            process = _context.Process(target=_script_main, args=(command[0], command[1:], streams, place))
            process.start()
            ranks.append(process)
        running = {process.sentinel: process for process in ranks}
        patience, code = timeout, 0
        while running:
            ended = multiprocessing.connection.wait(list(running), patience)
            if not ended:
                break
            code = next((code for code in (code, *(running.pop(one).exitcode for one in ended)) if code), 0)
            patience = 10 if code else timeout  # what all refuse each says; what one dies of leaves others waiting
        for process in running.values():
            process.kill()
            process.join()
        assert code or not running, f"{' '.join(command)} gave no result within {timeout} s"
        texts = ("".join(path.read_text() for path in paths if path.exists()) for paths in (outputs, errors))
        return subprocess.CompletedProcess(command, code, *texts)


def torchrun(world_size, *command):
    """Run a script on ``world_size`` ranks as a user would."""
    # standalone: ranks meet where torchrun itself listens, so that no other process takes the port meanwhile
    return run_tool(
        "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}", *command, timeout=300
    )
