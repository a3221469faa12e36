"""Instants at which to kill a job: a random time within one of the spans of its uninterrupted run."""

import dataclasses
import random
import statistics
from collections.abc import Sequence

from tests.faults.jobs import Mark

# what comes before a mark of this kind
PHASES = {"loss": "training", "validation": "evaluation", "save": "saving", "export": "export", "exit": "end"}


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of an uninterrupted run.

    Attributes:
        phase: what the run does: start, training, evaluation, saving, background saving, export, end.
        begins: the mark that it begins with.
        seconds: its length.
    """

    phase: str
    begins: Mark
    seconds: float


@dataclasses.dataclass(frozen=True)
class Instant:
    """When to kill: ``delay`` seconds after a mark, in this phase as far as the uninterrupted run tells."""

    phase: str
    step: int
    kind: str
    delay: float


def spans(marks: Sequence[Mark], background: bool) -> list[Span]:
    """The spans of an uninterrupted run.

    Args:
        marks: of the run, from its launch to its exit.
        background: whether checkpoints are written in the background; they are, from their step to their line.
    """
    found, before = [], marks[0]
    for mark in marks[1:]:
        phase, begins = PHASES.get(mark.kind), before
        if phase is None:
            continue
        if before.kind == "launch":
            phase = "start"
        if mark.kind in ("save", "export"):
            # the last line of its own step, which others may follow before the background is done
            earlier = [one for one in marks if one.seconds < mark.seconds]
            kinds = ("loss", "validation") if mark.kind == "save" else ("save",)
            begins = next((one for one in reversed(earlier) if one.step <= mark.step and one.kind in kinds), before)
            phase = "background saving" if background and mark.kind == "save" else phase
        found.append(Span(phase, begins, mark.seconds - begins.seconds))
        before = mark
    return found


def choose(among: Sequence[Span], resumed: int, generator: random.Random, phases: Sequence[str]) -> Instant:
    """Choose an instant: a phase, one of its spans that a resumed run still has, and a time within it.

    Args:
        among: spans of the uninterrupted run.
        resumed: step that the run resumes from.
        generator: decides.
        phases: to choose from.
    """
    left = [span for span in among if span.begins.kind == "launch" or span.begins.step > resumed]
    possible = [phase for phase in phases if any(span.phase == phase for span in left)] or ["start"]
    phase = generator.choice(possible)
    of_phase = [span for span in left if span.phase == phase]
    # rather an early one, so that the job that is started again has much left to be killed in
    span = of_phase[int(len(of_phase) * generator.random() ** 2)]
    # spans differ with the load of the machine
    usual = statistics.median(span.seconds for span in among if span.phase == phase)
    return Instant(phase, span.begins.step, span.begins.kind, generator.uniform(0, 1.1) * max(span.seconds, usual))


def phase_now(marks: Sequence[Mark], among: Sequence[Span]) -> str:
    """The phase of a job after these marks, as the uninterrupted run continued after the last of them."""
    if len(marks) == 1:
        return "start"
    saved = {mark.step for mark in marks if mark.kind == "save"}
    passed = {(mark.step, mark.kind) for mark in marks}
    for span in among:
        begins = span.begins.step, span.begins.kind
        if span.phase == "background saving" and begins in passed and span.begins.step not in saved:
            return span.phase
    last = marks[-1].step, marks[-1].kind
    return next((span.phase for span in among if (span.begins.step, span.begins.kind) == last), "start")
