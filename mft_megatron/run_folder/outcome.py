"""The outcome of the newest start of a run: ``outcome.json`` in its folder, for job scripts and for people.

torchrun exits with 1 whatever its ranks exit with: by that code a job script cannot tell a stalled run from a wrong
option. Rank 0 records that the run is running when it starts; the rank that knows how it ended replaces that. A file
that still says "running" after the job is gone means that the job was killed.
"""

import dataclasses
import json
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from mft_megatron import utc
from mft_megatron.disk_errors import explain
from mft_megatron.errors import InputError
from mft_megatron.exit_codes import FAILED, NAMES, OWNED
from mft_megatron.parsing.typed_json import from_json, parse_json

from .names import OUTCOME
from .replace_text import replace_text

RUNNING = "running"
# begins the reason of an outcome whose cause is in a rank that could not record one
LOST_RANK = "another rank has ended"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the newest start of a run ended, stored as JSON with these names.

    Attributes:
        name: of the outcome, in :data:`.exit_codes.NAMES`, or :data:`RUNNING`.
        code: exit code, of :mod:`.exit_codes`; ``None`` while it is running.
        reason: why, in one line.
        step: optimizer steps that the run has completed, as far as the process that wrote it knew.
        time: when it was written, in UTC (ISO 8601).
        host: machine of the process that wrote it.
        pid: that process.
        start: :func:`start_name` of the start, which is the same on all of its ranks.
    """

    name: str
    code: int | None
    reason: str
    step: int | None
    time: str
    host: str
    pid: int
    start: str


def record_outcome(folder: Path | str, code: int, reason: str, step: int | None = None) -> None:
    """Record how this start of the run ended; any rank may call it, and an error of the disk is only a line on stderr.

    A plain failure does not replace an outcome of the same start, because ranks whose neighbours have ended fail too.
    A start that another run's lock refused records nothing: the file belongs to the run that holds the lock.

    Args:
        folder: the run folder; nothing is recorded if it does not exist.
        code: exit code, of :mod:`.exit_codes`.
        reason: why, in one line.
        step: optimizer steps so far, if known.
    """
    if code == OWNED:
        return
    before = _known(Path(folder))
    if code == FAILED and outcome_of_this_start(folder) is not None:
        return
    if step is None and before is not None and before.start == start_name(os.environ):
        step = before.step
    _write(Path(folder), NAMES[code], code, reason, step)


def record_running(folder: Path | str, step: int, quiet: bool = False) -> None:
    """Record that a start of the run is running; rank 0 calls it once it owns the run folder, and every minute.

    Args:
        folder: the run folder.
        step: optimizer steps so far.
        quiet: say nothing of a disk that does not take it.
    """
    _write(Path(folder), RUNNING, None, "running, or killed before it could say how it ended", step, quiet)


def read_outcome(folder: Path | str) -> Outcome | None:
    """Read the outcome of the newest start of the run in ``folder``; ``None`` if none was recorded.

    Raises:
        InputError: the file is damaged.
    """
    file = Path(folder) / OUTCOME
    try:
        outcome = from_json(Outcome, parse_json(file))
        utc.moment_of(outcome.time)
        if outcome.name != NAMES.get(-1 if outcome.code is None else outcome.code, RUNNING):
            raise ValueError(f"code {outcome.code} and name {outcome.name!r} differ")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{file}: not an outcome of a run ({error}); remove it, the next start writes it") from None
    return outcome


def began_here(folder: Path | str) -> bool:
    """Whether the newest start that the file knows is this one."""
    outcome = _known(Path(folder))
    return outcome is not None and outcome.start == start_name(os.environ)


def outcome_of_this_start(folder: Path | str) -> Outcome | None:
    """The outcome that a rank of this start has recorded; ``None`` while it is running, or where none can be read."""
    outcome = _known(Path(folder))
    if outcome is None or outcome.code is None or outcome.start != start_name(os.environ):
        return None
    return outcome


def start_name(environment: Mapping[str, str]) -> str:
    """Name of this start of a job, the same on all of its ranks and another one after each restart."""
    names = (
        *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT"),
        *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
    )
    known = [environment[name] for name in names if name in environment]
    return "/".join(known) if "RANK" in environment and known else f"{socket.gethostname()}/{os.getpid()}"


def _known(folder: Path) -> Outcome | None:
    try:
        return read_outcome(folder)
    except (InputError, OSError):
        return None


def _write(folder: Path, name: str, code: int | None, reason: str, step: int | None, quiet: bool = False) -> None:
    if not folder.is_dir():
        return
    now, reason = utc.text_of(utc.now()), " ".join(reason.split())
    outcome = Outcome(name, code, reason, step, now, socket.gethostname(), os.getpid(), start_name(os.environ))
    try:
        replace_text(folder / OUTCOME, json.dumps(dataclasses.asdict(outcome), indent=2) + "\n")
    except OSError as error:
        if quiet:
            return
        print(f"note: {folder / OUTCOME}: {explain(error, folder)}; the outcome is {name}", file=sys.stderr, flush=True)
