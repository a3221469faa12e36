"""When a save that failed is tried again, and when a run gives up."""

import dataclasses

from mft_megatron.errors import InputError
from mft_megatron.exit_codes import STORAGE

# saves that fail in a row before a run ends
MOST_FAILURES = 6
# seconds between the attempts of the last save of a run, after which it ends
LAST_WAITS = (2.0, 8.0)


@dataclasses.dataclass
class Attempts:
    """Failures of saves since the last one that did not fail; every rank has the same.

    ::

        save fails ─► again after 1/10 of --save-interval ─► 2/10 ─► 4/10 ─► 8/10 ─► 10/10 ─► the run ends

    Saves that are asked for in between are made, and count. Without ``--save-interval`` there are only those.

    Attributes:
        interval: ``--save-interval``.
        failures: saves that failed in a row.
        next: step of the next attempt, if there is to be one.
    """

    interval: int | None
    failures: int = 0
    next: int | None = None

    def due(self, step: int) -> bool:
        """Whether a save that failed is to be tried again after ``step``."""
        return self.next is not None and step >= self.next

    def succeeded(self) -> None:
        """Count a checkpoint that is complete."""
        self.failures, self.next = 0, None

    def failed(self, step: int, why: str) -> None:
        """Count a failure that was seen after ``step``.

        Args:
            step: number of steps so far.
            why: what could not be written, and why.

        Raises:
            InputError: it was the last one that a run takes; the same on every rank, with the code STORAGE.
        """
        self.failures += 1
        if self.failures >= MOST_FAILURES:
            raise InputError(
                f"{why}; {self.failures} saves have failed in a row, so the run ends before it loses more: make room, "
                "or mend the file system, and start it again",
                code=STORAGE,
            )
        if self.interval is not None:
            tenth = -(-self.interval // 10)
            self.next = step + min(tenth * 2 ** (self.failures - 1), self.interval)
