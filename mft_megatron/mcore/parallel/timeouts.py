"""How long a rank waits for the others in a collective before it ends the run.

In a step all ranks are equally far, so a collective that takes ``--distributed-timeout-minutes`` hangs. At the start,
and around a checkpoint, ranks wait for one that reads or writes for long, or that compiles kernels in the first step.
"""

import contextlib
import datetime
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed import distributed_c10d

LONG = datetime.timedelta(hours=1)
# whose timeouts can be changed
BACKENDS = ("gloo", "nccl")

_of_steps = _long = _current = LONG


def begin(minutes: int, start_minutes: float = 0) -> datetime.timedelta:
    """Remember the timeout of steps; returns the timeout of the start, with which process groups are to be made.

    Args:
        minutes: the longest duration of a collective of a step.
        start_minutes: the time after which the watchdog ends a start, or a save, that hangs. Collectives wait longer,
            so that it can say which rank does.
    """
    global _of_steps, _long, _current
    _of_steps = datetime.timedelta(minutes=minutes)
    _long = max(LONG, datetime.timedelta(minutes=start_minutes + 2))
    _current = max(_of_steps, _long)
    return _current


def limit() -> None:
    """End the start: from now on the timeout of steps holds; nothing to do where it holds already."""
    _set(_of_steps)


@contextlib.contextmanager
def long_waits() -> Iterator[None]:
    """Let ranks wait for long inside the block, for one that reads or writes."""
    before = _current
    _set(max(before, _long))
    try:
        yield
    finally:
        _set(before)


def _set(timeout: datetime.timedelta) -> None:
    """Set the timeout of all collectives that this process enqueues from now on, in all of its groups.

    NCCL's obey it in every supported torch; gloo of torch 2.6 keeps the timeout that it was made with.
    """
    global _current
    if timeout == _current:
        return
    _current = timeout
    # public since torch 2.14
    change = getattr(distributed_c10d, "set_timeout", None) or distributed_c10d._set_pg_timeout
    for group in list(distributed_c10d._world.pg_map) if dist.is_initialized() else ():
        if dist.get_backend(group) in BACKENDS:
            change(timeout, group)
