"""Progress marks: what this process does now, for the watchdog that says where a run hangs.

::

    mark_step(5, packs) ─► mark("read", micro_batch=0) ─► mark("micro-batch", micro_batch=0) ─► mark("optimizer") ─► …

Each mark replaces the one before it. A process that makes no new mark for a phase's limit makes no progress
(``mft_megatron/training/watchdog/limits.py`` has the limits). A mark takes some hundred nanoseconds, asks no device and
writes nothing, so it may stand inside a micro-batch.
"""

import dataclasses
import time
from collections.abc import Iterable, Mapping
from typing import Any

# the phase before the first mark
START = "start"


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """An activity of a process since some moment.

    Attributes:
        phase: name of the activity, such as ``micro-batch`` or ``save``.
        since: ``time.monotonic()`` when it began, in seconds.
        where: details by name, such as the micro-batch or the file.
    """

    phase: str
    since: float
    where: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Position:
    """The newest mark of a process, and the step that it belongs to.

    Attributes:
        mark: the newest mark.
        step: the optimizer step that is, or was last, taken; ``None`` before the first.
        packs: the packs of its global batch.
        first_step: whether it is the first step of this process.
    """

    mark: Mark
    step: int | None
    packs: Iterable[int]
    first_step: bool


_now = Mark(START, time.monotonic(), {})
_step: tuple[int | None, Iterable[int], bool] = (None, (), False)


def mark(phase: str, **where: Any) -> None:
    """Mark what this process does from now on.

    Args:
        phase: name of the activity; those of ``LONG_PHASES`` in the watchdog's limits may take long without another
            mark.
        where: details for a report: numbers, names, arrays; they are kept as they are until the next mark.
    """
    global _now
    _now = Mark(phase, time.monotonic(), where)


def mark_step(step: int, packs: Iterable[int]) -> None:
    """Mark the beginning of an optimizer step.

    Args:
        step: counted from 1.
        packs: the packs of its global batch; -1 for rows without content.
    """
    global _step
    _step = (step, packs, _step[0] is None)
    mark("step")


def position() -> Position:
    """Return the newest mark with its step, from any thread."""
    return Position(_now, *_step)


def restart() -> None:
    """Forget all marks: a run begins in this process."""
    global _step
    _step = (None, (), False)
    mark(START)
