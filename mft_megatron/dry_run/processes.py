"""One process for each rank of a dry run, since a process is one rank of torch's process groups."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Generic, TypeVar

from mft_megatron import parent_process
from mft_megatron.errors import InputError

R = TypeVar("R")
# Forked from a process that has imported torch and Megatron-Core, they start at once.
_context = multiprocessing.get_context("fork")


class RankError(Exception):
    """A rank ended with an error that is not of the user's input.

    Attributes:
        summary: the rank and the error in a line; the message is the traceback.
    """

    def __init__(self, traceback_text: str, summary: str):
        super().__init__(traceback_text, summary)
        self.summary = summary

    def __str__(self) -> str:
        text: str = self.args[0]
        return text


def run_in_processes(function: Callable[[int], R], ranks: Sequence[int], at_once: int | None = None) -> Iterator[R]:
    """Call ``function(rank)`` in a process for each rank, several at once.

    Args:
        function: its results and its errors are pickled.
        ranks: in the order of the results.
        at_once: processes at the same time; by default one for each CPU that this process may use.

    Yields:
        the results.

    Raises:
        InputError: a rank raised it, or its process was killed.
        RankError: a rank raised another error.
    """
    at_once = at_once or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1
    running: list[_Rank[R]] = []
    waiting = list(ranks)
    try:
        while waiting or running:
            while waiting and len([rank for rank in running if not rank.ended]) < at_once:
                running.append(_Rank(function, waiting.pop(0)))
            if running[0].ended or not waiting:
                yield running.pop(0).result()
            else:
                wait([rank.pipe for rank in running if not rank.ended])
    finally:
        for rank in running:
            rank.stop()


class _Rank(Generic[R]):
    """A process with one rank."""

    def __init__(self, function: Callable[[int], R], rank: int):
        self.rank = rank
        self.pipe, sender = _context.Pipe(duplex=False)
        self._process = _context.Process(target=_call, args=(function, rank, sender), daemon=True)
        self._process.start()
        sender.close()

    @property
    def ended(self) -> bool:
        """Whether there is a result, or the process is gone."""
        return self.pipe.poll()

    def result(self) -> R:
        """Wait for the result."""
        try:
            result, error = self.pipe.recv()
        except EOFError:
            self._process.join()
            raise InputError(
                f"--rank {self.rank}: its process ended without a result (exit code {self._process.exitcode}); the "
                "system kills processes when its memory is used up: report on fewer ranks at a time"
            ) from None
        finally:
            self.stop()
        if error is not None:
            raise error
        return result

    def stop(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _call(function: Callable[[int], R], rank: int, sender: Connection) -> None:
    """Send the result, or the error, of a rank."""
    parent_process.end_with_parent()
    try:
        sender.send((function(rank), None))
    except InputError as error:
        sender.send((None, InputError(f"rank {rank}: {error}")))
    except Exception as error:
        summary = f"rank {rank}: {type(error).__name__}: {error}"
        sender.send((None, RankError(f"rank {rank}:\n{traceback.format_exc()}", summary)))
