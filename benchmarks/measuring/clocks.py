"""Wall and CPU time of calls, the machine they ran on, and writing the numbers down; without torch.

Wall time is what a user waits for; CPU time of this process is less disturbed by other load on the machine.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(call: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds of one call by both clocks, and its result."""
    started = {name: now() for name, now in CLOCKS.items()}
    result = call()
    return {name: now() - started[name] for name, now in CLOCKS.items()}, result


def in_turn(calls: dict[str, Callable[[], Any]], repeat: int) -> dict[str, list[dict[str, float]]]:
    """Readings of several calls, each once in every round, so that other load disturbs all alike."""
    readings: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for _ in range(repeat):
        for name, call in calls.items():
            readings[name].append(timed(call)[0])
    return readings


def median_of(readings: list[dict[str, float]], scale: float = 1.0) -> dict[str, float]:
    """Median of each clock over several readings."""
    return {name: scale * statistics.median(reading[name] for reading in readings) for name in CLOCKS}


def ratio_of(readings: list[dict[str, float]], others: list[dict[str, float]]) -> dict[str, float]:
    """Median of each clock's ratio, round by round: both readings of a round saw the same load."""
    pairs = list(zip(readings, others, strict=True))
    return {name: statistics.median(ours[name] / other[name] for ours, other in pairs) for name in CLOCKS}


def resident_bytes(name: str) -> int | None:
    """Resident memory of this process in bytes, from /proc: ``VmRSS`` now, ``VmHWM`` at its peak; ``None`` elsewhere.

    getrusage would begin with the memory of the parent process.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def processor() -> str:
    """Number and name of the processors."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.machine()


def machine() -> str:
    """Processor and versions in a line."""
    return f"{processor()}; Python {platform.python_version()}, numpy {np.__version__}"


def write_numbers(options: argparse.Namespace, machine: str, results: object) -> None:
    """Write all numbers to ``--json FILE``, with the machine and the options; nothing without that option."""
    if options.json:
        shape = {name: value for name, value in vars(options).items() if name != "json"}
        content = {"machine": machine, "options": shape, "results": results}
        options.json.write_text(json.dumps(content, indent=1, default=str))
