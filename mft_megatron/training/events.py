"""Events of a run, written to ``metrics.jsonl`` beside steps and evaluations: a new one is a line of :data:`EVENTS`."""

import dataclasses
import types
from collections.abc import Mapping

from .progress import Progress

Type = type | types.UnionType


@dataclasses.dataclass(frozen=True)
class Field:
    """One entry of an event: its name, its type and its meaning; an ``optional`` one may be absent."""

    name: str
    type: Type
    meaning: str
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Event:
    """A kind of event: when it occurs, and its fields beside ``kind``, ``event``, ``step``, ``consumed_samples``."""

    occurs: str
    fields: tuple[Field, ...]

    def problem(self, details: Mapping[str, object]) -> str | None:
        """The first detail that is missing, unknown or of another type, in a phrase; ``None`` if all fit."""
        fields = {field.name: field for field in self.fields}
        for name, value in details.items():
            if name not in fields:
                return f"unknown field {name}"
            if not isinstance(value, fields[name].type):
                return f"{name} is {value!r}, not of type {fields[name].type}"
        missing = [field.name for field in self.fields if not field.optional and field.name not in details]
        return f"no {missing[0]}" if missing else None


_REASON = Field("reason", str, "why, with the option that decided it")
EVENTS: Mapping[str, Event] = {
    "load": Event(
        "the run starts from a checkpoint or a model",
        (
            Field("path", str, "folder of the checkpoint or model"),
            Field("finetune", bool, "whether only its weights are used, and training starts at step 0"),
            Field("adapter", str, "folder of the adapter in Hugging Face's format", optional=True),
            Field("base", str, "folder of the model that the adapters in path belong to", optional=True),
        ),
    ),
    "save": Event(
        "a checkpoint is complete",
        (
            Field("path", str, "its folder"),
            Field("seconds", float, "time from the start of the save until it was complete"),
            Field("best", bool, "true if it has the best evaluation so far; else absent", optional=True),
        ),
    ),
    "remove": Event("a checkpoint was removed", (Field("path", str, "its folder"), _REASON)),
    "export": Event(
        "a checkpoint was exported while the run continues",
        (Field("path", str, "folder of the exported model"), Field("seconds", float, "duration of the export")),
    ),
    "export failed": Event(
        "a checkpoint could not be exported",
        (Field("path", str, "folder that the model was to be written to"), Field("failed", str, "the error")),
    ),
    "skip": Event(
        "a step updated nothing",
        (_REASON, Field("loss_scale", float, "loss scale at which gradients overflowed", optional=True)),
    ),
    "warning": Event(
        "something deserves attention",
        (_REASON, Field("tasks", list, "names of the tasks concerned", optional=True)),
    ),
    "task early stop": Event(
        "a task has converged and is no longer trained",
        (
            Field("task", str, "its name"),
            Field("best_loss", float | None, "its best validation loss"),
            Field("best_step", int | None, "step of that evaluation"),
            Field("weight", float, "its weight from now on, 0"),
        ),
    ),
    "epoch": Event(
        "a pass over the packs of the training split is over",
        (
            Field("epoch", int, "index of the pass, from 0"),
            Field("tasks", dict, "by name: samples, how many sample slices were used, and digest of which"),
            Field("complete", bool, "whether all of it was counted and is proved to be as planned"),
        ),
    ),
    "early stop": Event("early stopping ends the run", (_REASON,)),
    "exit": Event("the run ends before its last step", (_REASON,)),
}


def event_record(progress: Progress, event: str, **details: object) -> dict[str, object]:
    """Make the record of an event.

    Args:
        progress: of the run when it occurs.
        event: a name in :data:`EVENTS`.
        details: the event's fields.

    Raises:
        ValueError: the event is not in the table, or a field is missing, unknown or of another type.
    """
    if event not in EVENTS:
        raise ValueError(f"no event {event!r} in the table of events")
    problem = EVENTS[event].problem(details)
    if problem is not None:
        raise ValueError(f"event {event!r}: {problem}")
    return {
        "kind": "event",
        "event": event,
        "step": progress.step,
        "consumed_samples": progress.consumed_samples,
        **details,
    }
