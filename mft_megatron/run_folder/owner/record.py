"""The record of a run folder's owner, ``owner.json``: which process of which machine, and since when."""

import dataclasses
import json
import os
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path

from mft_megatron import process_table, utc
from mft_megatron.parsing.typed_json import from_json

# variables with the number of a job, by scheduler
_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")


@dataclasses.dataclass(frozen=True)
class OwnerRecord:
    """A process that owns a run folder, stored as JSON with these names.

    Attributes:
        host: name of its machine.
        pid: its process id there.
        since: when it became the owner, in UTC (ISO 8601).
        what: what it does, such as "training".
        job: number of its job, where a scheduler says so.
        boot: identity of the machine's kernel since it was started.
        pid_namespace: identity of the set of processes in which ``pid`` counts, such as a container's.
        started: when the process started, in ticks of that kernel; with ``pid`` it identifies the process.
        token: random, of this ownership alone.
    """

    host: str
    pid: int
    since: str
    what: str
    job: str = ""
    boot: str = ""
    pid_namespace: str = ""
    started: int = 0
    token: str = ""

    def describe(self) -> str:
        """The owner for messages."""
        job = f"job {self.job}, " if self.job else ""
        return f"{self.what} on {self.host or 'an unknown machine'}, {job}process {self.pid}, since {self.since}"

    def same_processes(self, other: "OwnerRecord") -> bool:
        """Whether both count process ids in the same set: on one machine that has not been started again."""
        names = ("host", "boot", "pid_namespace")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def same_machine(self, other: "OwnerRecord") -> bool:
        """Whether both are on one machine that has not been started again."""
        return (self.host, self.boot) == (other.host, other.boot)


def this_process(what: str, environment: Mapping[str, str] = os.environ) -> OwnerRecord:
    """Describe this process as an owner from now on."""
    entry = process_table.look_up(os.getpid())
    return OwnerRecord(
        host=socket.gethostname(),
        pid=os.getpid(),
        since=utc.text_of(utc.now()),
        what=what,
        job=next((environment[name] for name in _JOBS if name in environment), ""),
        boot=_first_line(Path("/proc/sys/kernel/random/boot_id")),
        pid_namespace=_link(Path("/proc/self/ns/pid")),
        started=0 if entry is None else entry.started,
        token=uuid.uuid4().hex,
    )


def parse(text: str) -> OwnerRecord:
    """Read a record; of one that is damaged, or has only been begun, nothing but that there is one is known."""
    try:
        content = json.loads(text)
        return from_json(OwnerRecord, {field.name: content[field.name] for field in dataclasses.fields(OwnerRecord)})
    except (ValueError, KeyError, TypeError, RecursionError):
        return OwnerRecord(host="", pid=0, since="an unknown time", what="something", token="damaged")


def is_running(record: OwnerRecord) -> bool:
    """Whether the process of a record with the same process ids as this one is running, or stopped, and not ended."""
    if record.pid <= 0:
        return False
    entry = process_table.look_up(record.pid)
    if entry is not None:
        return entry.started == record.started and not entry.ended
    try:
        os.kill(record.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user, whom the machine hides
        return True
    return not process_table.is_shown()


def _first_line(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _link(file: Path) -> str:
    try:
        return os.readlink(file)
    except OSError:
        return ""
