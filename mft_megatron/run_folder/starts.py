"""The starts of a run, ``starts.json`` in its folder: a run that is started again and again and gets no further stops.

What counts: a start again, with the same options and releases of packages, that completed no step which the run had not
completed before. Two of them that ended with an error of their own are enough. One that was killed, or lost a rank,
counts so only if it had ten minutes; otherwise ten in a row are enough. One that was saved and left, or refused for its
options or a full disk, does not count.
"""

import dataclasses
import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path

from mft_megatron import utc
from mft_megatron.errors import InputError
from mft_megatron.exit_codes import DAMAGED, DIVERGED, FAILED, NAMES, NO_PROGRESS, STALLED
from mft_megatron.parsing.typed_json import from_json, parse_json

from .names import STARTS
from .outcome import LOST_RANK, read_outcome, record_running, start_name
from .replace_text import replace_text

ERRORS, KILLED = 2, 10
ENOUGH_TIME = datetime.timedelta(minutes=10)
# starts that the file remembers
_REMEMBERED = 50
_OF_THEIR_OWN = (FAILED, DIVERGED, STALLED, DAMAGED)


@dataclasses.dataclass(frozen=True)
class RunStart:
    """A start of the run, stored as JSON with these names.

    Attributes:
        start: its name, of :func:`.outcome.start_name`.
        time: when it owned the run folder, in UTC (ISO 8601).
        step: optimizer steps of the checkpoint that it started from.
        options: digest of its options and of releases of packages.
        code: exit code with which it ended; ``None`` while it runs, and if it was killed.
        reason: why it ended.
        reached: optimizer steps that it is known to have completed.
        last_seen: time of the last that is known of it.
    """

    start: str
    time: str
    step: int
    options: str
    code: int | None = None
    reason: str = ""
    reached: int = 0
    last_seen: str = ""


def begin_start(folder: Path | str, step: int, options: str, now: datetime.datetime | None = None) -> None:
    """Record that a start of the run is running, in both files; rank 0 calls it once it owns the run folder.

    Args:
        folder: the run folder.
        step: optimizer steps that it starts from.
        options: digest of what may be changed so that it gets further.
        now: the time, for tests.

    Raises:
        InputError: the run does not get further, with the exit code NO_PROGRESS.
        OSError: the files cannot be written.
    """
    folder, moment = Path(folder), now or utc.now()
    before = _ended(folder, _read(folder))
    this = RunStart(start_name(os.environ), utc.text_of(moment), step, options)
    content = [dataclasses.asdict(one) for one in [*before, this][-_REMEMBERED:]]
    replace_text(folder / STARTS, json.dumps(content, indent=1) + "\n")
    record_running(folder, step)
    fruitless = without_progress(before, options)
    if fruitless:
        last = fruitless[-1]
        how = "killed" if last.code is None else NAMES[last.code]
        raise InputError(
            f"{folder}: {len(fruitless)} starts in a row completed no new step (the run had completed step "
            f"{last.reached}); the last one, of {last.time}, ended as {how}: {last.reason or 'it said nothing'}. "
            "Mend the cause; starts are counted from 0 with other options or releases of packages, and after removing "
            f"{folder / STARTS}",
            code=NO_PROGRESS,
        )


def without_progress(starts: Sequence[RunStart], options: str) -> list[RunStart]:
    """The starts in a row that got the run no further, if they are so many that it should not be started again.

    Args:
        starts: those before, oldest first, each with its end.
        options: digest of the start that is to follow; starts before other options do not count.
    """
    same: list[RunStart] = []
    for one in starts:
        same = [*same, one] if one.options == options else []
    highest: int | None = None
    errors: list[RunStart] = []
    all_of_them: list[RunStart] = []
    for one in same:
        if highest is None or one.reached > highest:
            highest, errors, all_of_them = one.reached, [], []
            continue
        of_its_own = one.code in _OF_THEIR_OWN and not one.reason.startswith(LOST_RANK)
        if not of_its_own and one.code not in (None, FAILED):
            continue
        all_of_them.append(one)
        if of_its_own or utc.moment_of(one.last_seen) - utc.moment_of(one.time) >= ENOUGH_TIME:
            errors.append(one)
    if len(errors) >= ERRORS:
        return errors
    return all_of_them if len(all_of_them) >= KILLED else []


def _ended(folder: Path, starts: list[RunStart]) -> list[RunStart]:
    """The starts, the last one with what is known of its end."""
    if not starts:
        return []
    *others, last = starts
    try:
        outcome = read_outcome(folder)
    except InputError:
        outcome = None
    if outcome is None or outcome.start != last.start:
        return [*others, dataclasses.replace(last, reached=max(last.reached, last.step), last_seen=last.time)]
    reached = max(last.step, outcome.step or 0)
    ended = dataclasses.replace(last, code=outcome.code, reason=outcome.reason, reached=reached, last_seen=outcome.time)
    return [*others, ended]


def _read(folder: Path) -> list[RunStart]:
    """The starts that the file has; none where it is missing or damaged: it only ever ends a run that is stuck."""
    try:
        starts = [from_json(RunStart, one) for one in parse_json(folder / STARTS)]
        for moment in (moment for one in starts for moment in (one.time, one.last_seen) if moment):
            utc.moment_of(moment)
        return starts
    except (OSError, ValueError, TypeError):
        return []
