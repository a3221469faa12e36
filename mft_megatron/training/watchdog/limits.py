"""Limits of progress: how long a process may go without a new progress mark, by phase."""

import dataclasses

from mft_megatron.progress_marks import START, Position

# phases in which one rank reads or writes for long while others wait; another phase without a mark is a hang sooner
LONG_PHASES = (START, "load", "verify", "save", "save in the background", "rehearsal", "export", "end")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a run in seconds; 0 for none.

    Attributes:
        stall: of the phases of a step and of an evaluation.
        start: of the start, of the first step, in which kernels are compiled, and of ``LONG_PHASES``.
    """

    stall: float
    start: float

    def of(self, position: Position) -> float:
        """Seconds that a process may stay at a position; 0 for no limit."""
        long = position.step is None or position.first_step or position.mark.phase in LONG_PHASES
        return self.start if long else self.stall

    @property
    def shortest(self) -> float:
        """The shorter of the limits that are set; 0 if none is."""
        return min(filter(None, (self.stall, self.start)), default=0)
