"""Chains: a job that is killed several times and started again by the same command, and then compared."""

import dataclasses
import random
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from mft_megatron.run_folder.outcome import read_outcome
from tests.faults import comparison, instants, processes
from tests.faults.instants import Instant, Span
from tests.faults.jobs import Job, Mark, Server, run
from tests.faults.scenarios import Material, Scenario

# Seconds within which nothing may be left of a job. torchrun gives ranks 30 s to end after one of them failed.
GONE = {"all": 10, "launcher": 10, "rank": 35, "helper": 35}
# Seconds that a loaded machine may add.
SLACK = 5


@dataclasses.dataclass(frozen=True)
class Reference:
    """The uninterrupted run of a scenario.

    Attributes:
        spans: what it does when.
        listing: its files.
        contents: digests of what was trained (by checkpoint), or of its files.
        records: of its ``metrics.jsonl``.
    """

    spans: Sequence[Span]
    listing: list[str]
    contents: dict
    records: dict


@dataclasses.dataclass(frozen=True)
class Kill:
    """A kill that took place.

    Attributes:
        target: what was killed.
        chosen: when.
        phase: what the job did then, by its last line.
        seconds: until nothing was left of it.
    """

    target: str
    chosen: Instant
    phase: str
    seconds: float


@dataclasses.dataclass
class Report:
    """Outcome of a chain: its kills, and all that was wrong."""

    kills: list[Kill] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


class References:
    """Uninterrupted runs by scenario, each made once."""

    def __init__(self, folder: Path, material: Material, scenarios: dict[str, Scenario]):
        self._folder, self.material, self._scenarios = folder, material, scenarios
        self._locks = {name: threading.Lock() for name in scenarios}
        self._made: dict[str, Reference] = {}

    def of(self, name: str, server: Server) -> Reference:
        """The uninterrupted run of the scenario ``name``."""
        with self._locks[name]:
            if name not in self._made:
                scenario, out = self._scenarios[name], self._folder / name.replace(" ", "_")
                marks = run(server, self.material.command(scenario, out), out.with_suffix(".log"))
                self._made[name] = Reference(_spans(scenario, marks), *_results(scenario, out, server, []))
            return self._made[name]


def run_chain(
    server: Server,
    material: Material,
    scenario: Scenario,
    reference: Reference,
    generator: random.Random,
    kills: int,
    out: Path,
) -> Report:
    """Start a job, kill it up to ``kills`` times, let it end, and compare it with the uninterrupted one.

    Args:
        server: that starts it.
        material: that it reads.
        scenario: what is started.
        reference: the uninterrupted one.
        generator: decides when to kill what.
        kills: at most.
        out: the folder that the job writes; it must not exist.
    """
    report, output, finished = Report(), out.with_suffix(".log"), False
    for _ in range(kills):
        if finished:
            break
        with server.started(material.command(scenario, out), output) as job:
            resumed = _newest(out / "run") if scenario.trains else 0
            instant = instants.choose(reference.spans, resumed, generator, scenario.phases)
            target = generator.choice(scenario.targets)
            if not job.wait_for(instant.step, instant.kind, instant.delay):
                # it was faster than expected; a run that is finished can be started again
                finished = job.wait() == 0 or _was_done(scenario, output)
                if not finished:
                    report.problems.append(_failure(job, output))
                break
            phase = instants.phase_now(job.marks, reference.spans) if scenario.trains else instant.phase
            target = _kill(job, target, generator)
            if scenario.restarts and target == "rank":
                # torchrun starts the ranks again by itself
                report.kills.append(Kill(target, instant, phase, 0.0))
                if job.wait() != 0:
                    report.problems.append(_failure(job, output))
                break
            limit = GONE[target] + SLACK
            if target == "helper":
                job.wait()
            seconds, left = processes.wait_until_gone(server.pid, limit)
            report.kills.append(Kill(target, instant, phase, seconds))
            finished = scenario.trains and resumed == reference.spans[-1].begins.step
            if left:
                report.problems.append(
                    f"{limit} s after a kill of {target} ({phase}) there still is: "
                    + "; ".join(map(processes.describe, left))
                )
    if scenario.trains or not finished:
        with server.started(material.command(scenario, out), output) as job:
            if job.wait() != 0 and not _was_done(scenario, output):
                report.problems.append(_failure(job, output))
                return report
            _, left = processes.wait_until_gone(server.pid, SLACK)
            if left:
                report.problems.append(f"{SLACK} s after the end: " + "; ".join(map(processes.describe, left)))
    report.problems += compare(scenario, reference, out, server)
    return report


def compare(scenario: Scenario, reference: Reference, out: Path, server: Server) -> list[str]:
    """Differences between the results in ``out`` and those of the uninterrupted run."""
    problems: list[str] = []
    listing, contents, records = _results(scenario, out, server, problems)
    for what, expected, got in (
        ("files", reference.listing, listing),
        ("contents", reference.contents, contents),
        ("records", reference.records, records),
    ):
        if difference := comparison.difference(expected, got):
            problems.append(f"{what}: {difference}")
    return problems


def remove(out: Path) -> None:
    """Remove what a chain wrote."""
    shutil.rmtree(out, ignore_errors=True)
    out.with_suffix(".log").unlink(missing_ok=True)


def _spans(scenario: Scenario, marks: Sequence[Mark]) -> list[Span]:
    if scenario.trains:
        return instants.spans(marks, scenario.background)
    return [Span(phase, marks[0], marks[-1].seconds) for phase in scenario.phases]


def _results(scenario: Scenario, out: Path, server: Server, problems: list[str]) -> tuple[list[str], dict, dict]:
    listing = comparison.listing(out)
    if not scenario.trains:
        return listing, comparison.contents(out), {}
    contents = server.digests(out / "run", out.with_suffix(".json"))
    if (out / "hf").exists():
        contents["hf"] = comparison.contents(out / "hf")
    outcome = read_outcome(out / "run")
    contents["outcome"] = {} if outcome is None else {"name": outcome.name, "code": outcome.code, "step": outcome.step}
    records, wrong = comparison.records(out / "run")
    problems += wrong
    return listing, contents, records


def _newest(folder: Path) -> int:
    tracker = folder / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def _kill(job: Job, target: str, generator: random.Random) -> str:
    """Kill one of the processes of a job, or all; returns what was killed."""
    below, ranks = processes.descendants(job.pid), processes.children(job.pid)
    helpers = [process for process in below if process not in ranks] if job.has_ranks else below
    if target == "helper" and not helpers:
        target = "rank" if ranks else "all"
    if target == "all" or not below:
        processes.kill([job.pid, *below])
        return "all"
    processes.kill([job.pid if target == "launcher" else generator.choice(helpers if target == "helper" else ranks)])
    return target


def _was_done(scenario: Scenario, output: Path) -> bool:
    """Whether the last line refuses to make again what is complete."""
    return scenario.done is not None and scenario.done in output.read_text(errors="replace").splitlines()[-1]


def _failure(job: Job, output: Path) -> str:
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    end = "did not end" if job.code is None else f"exit code {job.code}"
    return f"started again: {end}: " + " / ".join(line[:300] for line in lines[-6:])
