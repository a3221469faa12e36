"""Wall and CPU time of a call, and the machine it ran on; without torch, which data preparation does not use either.

Wall time is what a user waits for; CPU time of this process is less disturbed by what else the machine does.
"""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(call: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds of one call by both clocks, and what it returned."""
    started = {name: now() for name, now in CLOCKS.items()}
    result = call()
    return {name: now() - started[name] for name, now in CLOCKS.items()}, result


def in_turn(calls: dict[str, Callable[[], Any]], repeat: int) -> dict[str, list[dict[str, float]]]:
    """Readings of several calls, one after the other in each round, so that other load meets all alike."""
    readings = {name: [] for name in calls}
    for _ in range(repeat):
        for name, call in calls.items():
            readings[name].append(timed(call)[0])
    return readings


def median_of(readings: list[dict[str, float]], scale: float = 1.0) -> dict[str, float]:
    """Median of each clock over several readings."""
    return {name: scale * statistics.median(reading[name] for reading in readings) for name in CLOCKS}


def peak_memory() -> float | None:
    """The most memory that this process has held, GB; ``None`` where the system does not say.

    Not from getrusage: there a process begins with what its parent held.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    held = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return held[0] * 1024 / 1e9 if held else None


def machine() -> str:
    """Processor and versions in a line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = f"{len(names)} × {names[0]}" if names else platform.machine()
    return f"{processor}; Python {platform.python_version()}, numpy {np.__version__}"
