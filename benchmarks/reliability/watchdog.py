"""Cost of the watchdog of hangs: progress marks in a step, and the threads that read them.

::

    mark(…) in a loop ─► µs of a mark × marks of a step ┐
    an idle watchdog with a store of notices ─► CPU time of its threads by second ─► fraction of a step

The marks are made by the thread that trains; the watchdog's threads take Python's lock from it while they compute.
"""

import argparse
import os
import sys
import threading
import time
import timeit
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring.clocks import machine, write_numbers

from mft_megatron import progress_marks
from mft_megatron.training.watchdog.limits import Limits
from mft_megatron.training.watchdog.watchdog import watching

# marks of a step beside two for each micro-batch: begun, sums, update, and two after it
OTHER_MARKS = 5


def microseconds_of_mark() -> float:
    """CPU time of a mark with the details of a micro-batch."""
    call = "mark('micro-batch', micro_batch=3, split='train', packs=packs)"
    names = {"mark": progress_marks.mark, "packs": list(range(8))}
    return 1e6 * min(timeit.repeat(call, globals=names, number=20_000, repeat=7, timer=time.process_time)) / 20_000


def seconds_of_threads(before: set[int]) -> Iterator[float]:
    """CPU time of each thread that was not there before."""
    for thread in threading.enumerate():
        if thread.ident is not None and thread.ident not in before:
            yield time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def fraction_of_time(seconds: float) -> float:
    """CPU time of the watchdog's threads, as a fraction of the time that a run takes.

    Args:
        seconds: to watch for.
    """
    before = {thread.ident for thread in threading.enumerate() if thread.ident is not None}
    end = time.monotonic() + seconds
    with watching(Limits(600, 3600), 0, 2, None):
        while time.monotonic() < end:
            progress_marks.mark_step(1, [])
            time.sleep(0.05)
        return sum(seconds_of_threads(before)) / seconds


def main() -> None:
    """Measure, print the table, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=30, help="to watch the threads for")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 8, 64], help="of a step, on a rank")
    parser.add_argument("--step-seconds", type=float, nargs="+", default=[0.1, 1, 10], help="durations of a step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args()
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ["MASTER_PORT"] = str(store.port)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    mark, threads = microseconds_of_mark(), fraction_of_time(options.seconds)
    dist.destroy_process_group()
    print(f"{machine()}\na mark: {mark:.2f} µs; threads: {threads:.4%} of the time\n")
    print("| micro-batches | " + " | ".join(f"step of {seconds:g} s" for seconds in options.step_seconds) + " |")
    print("|---:|" + "---:|" * len(options.step_seconds))
    results = {"mark_microseconds": mark, "threads": threads, "of_a_step": {}}
    for micro_batches in options.micro_batches:
        marks = OTHER_MARKS + 2 * micro_batches
        fractions = [threads + 1e-6 * mark * marks / seconds for seconds in options.step_seconds]
        results["of_a_step"][micro_batches] = dict(zip(options.step_seconds, fractions, strict=True))
        print(f"| {micro_batches} | " + " | ".join(f"{fraction:.4%}" for fraction in fractions) + " |")
    write_numbers(options, machine(), results)


if __name__ == "__main__":
    main()
