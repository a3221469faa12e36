"""Running functions on several gloo ranks, and the project's commands, from plain pytest.

The ranks are forked from a server that has imported torch and Megatron-Core once, so that a test does not pay for eight
imports. Commands run in a new process where that is the point of a test, and are forked as well elsewhere.
"""

import contextlib
import multiprocessing
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

_context = multiprocessing.get_context("forkserver")
# torch imports its compiler when the first optimizer is made, half a second on each rank
_context.set_forkserver_preload(["mft_megatron.training.pretrain", "torch._dynamo"])


def _ready_forked_process():
    """Set one thread."""
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


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


@contextlib.contextmanager
def reserved_ports(count: int) -> Iterator[list[int]]:
    """Ports for rank 0 to listen on, which the system gives to no other process meanwhile.

    A socket is bound to each and does not listen, so a process that asks for this very port may listen on it, however
    often; one that asks for any port gets another.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("127.0.0.1", 0))
        yield [one.getsockname()[1] for one in sockets]


def run_on_ranks(world_size, function, *arguments, timeout=180):
    """Call ``function(*arguments)`` on ``world_size`` ranks; returns its results by rank.

    ``function`` is a module-level function and starts the process groups itself. A rank that fails fails the test with
    its traceback; the others are killed.
    """
    with reserved_ports(1) as (port,):
        return _run_on_ranks(world_size, port, function, arguments, timeout)


def _run_on_ranks(world_size, port, function, arguments, timeout):
    ranks = []
    for rank in range(world_size):
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(target=_rank_main, args=(sender, rank, world_size, port, function, arguments))
        process.start()
        sender.close()
        ranks.append((process, receiver))
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
                    pytest.fail(f"rank {rank} of {world_size} died without a message")
                if not succeeded:
                    pytest.fail(f"rank {rank} of {world_size}:\n{results[rank]}")
        for process, _ in ranks:
            process.join(30)
        return results
    finally:
        for process, _ in ranks:
            if process.is_alive():
                process.kill()


def _ending_rank_main(streams, rank, world_size, port, function, arguments):
    _redirect(streams)
    _be_rank(rank, world_size, port)
    _ready_forked_process()
    function(*arguments)


def ends_of_ranks(world_size, function, *arguments, timeout=60):
    """Call ``function(*arguments)`` on ranks that may end in any way; returns the exit code and stderr of each.

    A rank that has not ended within ``timeout`` seconds is killed, and its exit code is ``None``.
    """
    with tempfile.TemporaryDirectory() as folder, reserved_ports(1) as (port,):
        processes, errors = [], [Path(folder) / str(rank) for rank in range(world_size)]
        for rank, path in enumerate(errors):
            rank_arguments = ([os.devnull, path], rank, world_size, port, function, arguments)
            processes.append(_context.Process(target=_ending_rank_main, args=rank_arguments))
            processes[-1].start()
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(end - time.monotonic(), 0))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        return [(code, path.read_text()) for code, path in zip(codes, errors, strict=True)]


def run_tool(*command, **options):
    """Run one of the project's commands as a user would; returns the completed process, with its output as text."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, **options
    )


def _redirect(streams):
    """Send standard output and standard error to files."""
    for stream, path in zip((sys.stdout, sys.stderr), streams, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream.fileno())
        os.close(file)


def _script_main(script, words, streams, rank_arguments):
    _redirect(streams)
    if rank_arguments is not None:
        _be_rank(*rank_arguments)
    _ready_forked_process()
    os.chdir(ROOT)
    sys.argv = [script, *words]
    runpy.run_path(str(ROOT / script), run_name="__main__")  # leaves with sys.exit


def run_forked(script, *words, world_size=None, timeout=300):
    """Run a script like :func:`run_tool`, but forked from the server of the ranks, which saves 3 s of imports.

    The script runs as the main module, from its command line to its exit code; with ``world_size`` on so many ranks, as
    :func:`torchrun` would. It does not show that a new process can import what it needs: for each script other tests
    show that with :func:`run_tool` and :func:`torchrun`.
    """
    command, ranks = [str(script), *map(str, words)], []
    with tempfile.TemporaryDirectory() as folder, reserved_ports(1) as (port,):
        outputs, errors = ([Path(folder) / f"{name}{rank}" for rank in range(world_size or 1)] for name in "oe")
        for rank, streams in enumerate(zip(outputs, errors, strict=True)):
            arguments = None if world_size is None else (rank, world_size, port)
            process = _context.Process(target=_script_main, args=(command[0], command[1:], streams, arguments))
            process.start()
            ranks.append(process)
        running = {process.sentinel: process for process in ranks}
        patience, code = timeout, 0
        while running:
            ended = multiprocessing.connection.wait(list(running), patience)
            if not ended:
                break
            code = next((code for code in (code, *(running.pop(one).exitcode for one in ended)) if code), 0)
            patience = 10 if code else timeout  # ranks that wait for a dead one do not end
        for process in running.values():
            process.kill()
            process.join()
        assert code or not running, f"{' '.join(command)} gave no result within {timeout} s"
        texts = ("".join(path.read_text() for path in paths if path.exists()) for paths in (outputs, errors))
        return subprocess.CompletedProcess(command, code, *texts)


def torchrun(world_size, *command):
    """Run a script on ``world_size`` ranks as a user would."""
    # standalone: torchrun itself listens on the port, so that no other process can take it
    return run_tool(
        "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}", *command, timeout=300
    )
