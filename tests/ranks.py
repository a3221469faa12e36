"""Running functions on several gloo ranks, and the project's commands, from plain pytest.

The ranks are forked from a server that has imported torch and Megatron-Core once, so that a case costs its own work and
not eight imports.
"""

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

_context = multiprocessing.get_context("forkserver")
# torch imports its compiler when the first optimizer is made, half a second on each rank
_context.set_forkserver_preload(["mft_megatron.training.pretrain", "torch._dynamo"])


def _rank_main(pipe, rank, world_size, port, function, arguments):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    try:
        import torch

        torch.set_num_threads(1)
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


def torchrun(world_size, *command):
    """Run a script on ``world_size`` ranks as a user would."""
    # standalone: ranks meet where torchrun itself listens, so that no other process takes the port meanwhile
    return run_tool(
        "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}", *command, timeout=300
    )


def refusal(process) -> str:
    """The one line with which a command refused bad input; checks that it is one and that nothing else was said."""
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode != 0, process.stdout
    assert len(lines) == 1, process.stderr
    assert "Traceback" not in process.stderr, process.stderr
    return lines[0]
