"""Two clocks, and the machine they run on.

Wall time is what a user waits for; CPU time of this process is less disturbed by what else the machine does. Both wait
for the device first, so that a kernel is counted where it was started.
"""

import platform as host
import statistics
import time
from pathlib import Path

from mft_megatron.mcore.platform import devices

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Clock:
    """Seconds spent inside ``with clock``, by both clocks; what is nested counts once."""

    def __init__(self):
        self.seconds = dict.fromkeys(CLOCKS, 0.0)
        self._depth = 0

    def start(self) -> None:
        self._depth += 1
        if self._depth == 1:
            devices.synchronize()
            self._started = {name: now() for name, now in CLOCKS.items()}

    def stop(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            devices.synchronize()
            for name, now in CLOCKS.items():
                self.seconds[name] += now() - self._started[name]

    def take(self) -> dict[str, float]:
        """What has been counted since the last time, and start again from 0."""
        taken, self.seconds = self.seconds, dict.fromkeys(CLOCKS, 0.0)
        return taken

    def __enter__(self) -> "Clock":
        self.start()
        return self

    def __exit__(self, *error) -> None:
        self.stop()


def median_of(readings: list[dict[str, float]], scale: float = 1.0) -> dict[str, float]:
    """Median of each clock over several readings."""
    return {name: scale * statistics.median(reading[name] for reading in readings) for name in CLOCKS}


def ratio_of(readings: list[dict[str, float]], others: list[dict[str, float]]) -> dict[str, float]:
    """Median of each clock's ratio, reading by reading: two readings of one round met the same load."""
    pairs = list(zip(readings, others, strict=True))
    return {name: statistics.median(ours[name] / other[name] for ours, other in pairs) for name in CLOCKS}


def telling() -> str:
    """The clock to compare by: CPU time where the process computes itself, wall time where it waits for a GPU."""
    return "cpu" if devices.device().type == "cpu" else "wall"


def machine() -> str:
    """Processor, device and versions in a line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}; {devices.describe()}" if names else f"{host.machine()}; {devices.describe()}"
