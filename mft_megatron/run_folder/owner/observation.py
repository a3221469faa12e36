"""Observation of a run folder's owner by a process that wants to be it: how long it is there, and whether it beats."""

import time

from .record import OwnerRecord


class Observation:
    """Signs of one owner since it was seen first.

    Attributes:
        beaten: whether its beat has changed.
    """

    def __init__(self) -> None:
        self._token: str | None = ""
        self._beat, self._said = 0, False
        self._since = time.monotonic()
        self.beaten = False

    @property
    def seconds(self) -> float:
        """Seconds since this owner was seen first."""
        return time.monotonic() - self._since

    def see(self, record: OwnerRecord | None, beat: int) -> None:
        """Look at the record and the time of the last beat, in nanoseconds."""
        token = None if record is None else record.token
        if token != self._token:
            self._token, self._beat, self._since, self.beaten = token, beat, time.monotonic(), False
        self.beaten = self.beaten or beat != self._beat

    def announces(self, seconds: float) -> bool:
        """Whether this is the first call so many seconds after an owner was seen first."""
        if self._said or self.seconds < seconds:
            return False
        self._said = True
        return True
