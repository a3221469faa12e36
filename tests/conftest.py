"""Running a function on several gloo ranks from plain pytest.

The ranks are forked from a server that has imported torch and Megatron-Core once, so that a case costs its own work and
not eight imports.
"""

import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["mft_megatron.mcore.step"])


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
        pipe.send((True, function(*arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_on_ranks(world_size, function, *arguments, timeout=180):
    """Call ``function(*arguments)`` on ``world_size`` ranks; its results, by rank.

    ``function`` is a module-level function and starts the process groups itself. A rank that fails fails the test with
    its traceback; the others are ended.
    """
    port = _free_port()
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
                    succeeded, results[rank] = pipe.recv()
                except EOFError:
                    pytest.fail(f"rank {rank} of {world_size} died without a word")
                if not succeeded:
                    pytest.fail(f"rank {rank} of {world_size}:\n{results[rank]}")
        for process, _ in ranks:
            process.join(30)
        return results
    finally:
        for process, _ in ranks:
            if process.is_alive():
                process.kill()


@pytest.fixture(scope="session")
def on_ranks():
    """:func:`run_on_ranks`."""
    return run_on_ranks
