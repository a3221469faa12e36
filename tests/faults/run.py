"""Kill jobs at random instants and resume them: ``make test-faults``.

Prints a line for each chain of kills. Every chain is decided by the seed and its number, so that ``SEED=… CHAIN=…``
repeats it as far as clocks allow. Ends with code 1 if anything was lost, doubled or left behind.
"""

import argparse
import collections
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.faults.chains import Kill, References, Report, remove, run_chain
from tests.faults.jobs import Server, fork_server
from tests.faults.scenarios import SCENARIOS, Material


def main() -> int:
    """Run chains until there were enough kills; returns the exit code."""
    options = _options()
    names = [name for name in SCENARIOS if not options.only or name in options.only.split("; ")]
    if not names:
        sys.exit(f"--only {options.only}: there is {'; '.join(SCENARIOS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("the harness was told to end"))
    print(f"SEED={options.seed}: {options.kills} kills, {options.jobs} chains at once", flush=True)
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        harness = Harness(Path(folder), names, options)
        threads = [threading.Thread(target=harness.work, daemon=True) for _ in range(options.jobs)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            harness.close()
    return harness.summary()


class Harness:
    """Chains, taken one after the other by as many threads as run at once."""

    def __init__(self, folder: Path, names: list[str], options: argparse.Namespace):
        self._folder, self._names, self._options = folder, names, options
        self._lock, self._start = threading.Lock(), time.monotonic()
        self._next = 0 if options.chain is None else options.chain
        self._reports: list[Report] = []
        self._failed: list[str] = []
        self._servers: list[Server] = []
        self._shared: tuple[Material, References] | None = None

    def work(self) -> None:
        """Run chains until there were enough kills, or the time is over."""
        try:
            with fork_server() as server:
                self._servers.append(server)
                while (number := self._take()) is not None:
                    name, generator = self._plan(number)
                    material, references = self._prepared(server)
                    out = self._folder / f"chain_{number}"
                    report = run_chain(
                        server,
                        material,
                        SCENARIOS[name],
                        references.of(name, server),
                        generator,
                        generator.randint(2, self._options.most),
                        out,
                    )
                    self._record(number, name, report, out)
        except BaseException as error:
            self._failed.append(f"the harness: {type(error).__name__}: {error}")

    def close(self) -> None:
        """End everything that was started."""
        for server in self._servers:
            server.close()

    def summary(self) -> int:
        """Print what was killed; returns the exit code."""
        kills = [kill for report in self._reports for kill in report.kills]
        print(f"{len(kills)} kills in {len(self._reports)} chains, {time.monotonic() - self._start:.0f} s", flush=True)
        for what, count in sorted(collections.Counter((kill.phase, kill.target) for kill in kills).items()):
            print(f"  {count:4d}  {what[1]:10}  {what[0]}")
        for target in sorted({kill.target for kill in kills}):
            slowest = max(kill.seconds for kill in kills if kill.target == target)
            print(f"  nothing was left after a kill of {target} within {slowest:.1f} s")
        for line in self._failed:
            print(f"FAILED {line}")
        return 1 if self._failed or not kills else 0

    def _plan(self, number: int) -> tuple[str, random.Random]:
        weighted = [name for name in self._names for _ in range(SCENARIOS[name].weight)]
        return weighted[number % len(weighted)], random.Random(f"{self._options.seed}/{number}")

    def _take(self) -> int | None:
        with self._lock:
            kills = sum(len(report.kills) for report in self._reports)
            over = time.monotonic() - self._start > 60 * self._options.minutes
            once = self._options.chain is not None and self._next != self._options.chain
            if kills >= self._options.kills or over or once or (self._failed and self._options.stop):
                return None
            self._next += 1
            return self._next - 1

    def _prepared(self, server) -> tuple[Material, References]:
        with self._lock:
            if self._shared is None:
                material = Material(self._folder, server)
                names = {name: SCENARIOS[name] for name in self._names}
                for name in names:
                    # makes what it reads, before two chains want it at once
                    material.command(names[name], self._folder / "unused")
                self._shared = material, References(self._folder, material, names)
            return self._shared

    def _record(self, number: int, name: str, report: Report, out: Path) -> None:
        with self._lock:
            self._reports.append(report)
            kills = ", ".join(map(_in_words, report.kills)) or "no kill: too late"
            print(f"{number:4d} {name}: {kills}: {'equal' if not report.problems else 'FAILED'}", flush=True)
            for problem in report.problems:
                print(f"       {problem}", flush=True)
                self._failed.append(f"{name} (SEED={self._options.seed} CHAIN={number}): {problem}")
            if report.problems and self._options.keep is not None:
                self._options.keep.mkdir(parents=True, exist_ok=True)
                for path in (out, out.with_suffix(".log")):
                    shutil.move(path, self._options.keep / f"{self._options.seed}_{path.name}")
            remove(out)


def _in_words(kill: Kill) -> str:
    after = f"{kill.chosen.delay:.2f} s after {kill.chosen.kind} {kill.chosen.step or ''}".strip()
    return f"{kill.target} in {kill.phase} ({after})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="kill at least so often")
    parser.add_argument("--most", type=int, default=5, help="kills of one chain at most")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="decides all")
    parser.add_argument("--chain", type=int, help="run only the chain of this number")
    parser.add_argument("--jobs", type=int, default=2, help="chains at once")
    parser.add_argument("--minutes", type=float, default=40, help="begin no chain later")
    parser.add_argument("--only", help="names of scenarios, with '; ' between them")
    parser.add_argument("--keep", type=Path, help="folder for what failed")
    parser.add_argument("--stop", action="store_true", help="begin no chain after a failure")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
