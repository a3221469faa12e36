"""A clock that waits for the device, and the device that it ran on.

A kernel is counted where it was started: the clock waits for the device before it starts and before it stops.
"""

from mft_megatron.mcore.platform import devices

from .clocks import CLOCKS, processor


class Clock:
    """Seconds spent inside ``with clock``, by both clocks; nested use counts once."""

    def __init__(self):
        self.seconds = dict.fromkeys(CLOCKS, 0.0)
        self._depth = 0

    def start(self) -> None:
        """Start counting, unless it is counting already."""
        self._depth += 1
        if self._depth == 1:
            devices.synchronize()
            self._started = {name: now() for name, now in CLOCKS.items()}

    def stop(self) -> None:
        """Stop counting when it was stopped as often as it was started."""
        self._depth -= 1
        if self._depth == 0:
            devices.synchronize()
            for name, now in CLOCKS.items():
                self.seconds[name] += now() - self._started[name]

    def take(self) -> dict[str, float]:
        """Seconds since the last call, by clock; counting starts again from 0."""
        taken, self.seconds = self.seconds, dict.fromkeys(CLOCKS, 0.0)
        return taken

    def __enter__(self) -> "Clock":
        self.start()
        return self

    def __exit__(self, *error) -> None:
        self.stop()


def main_clock() -> str:
    """Name of the clock to compare by: CPU time where the process computes, wall time where it waits for a GPU."""
    return "cpu" if devices.device().type == "cpu" else "wall"


def machine() -> str:
    """Processor, device and versions in a line."""
    return f"{processor()}; {devices.describe()}"
