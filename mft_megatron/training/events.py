"""Events of a run, written to ``metrics.jsonl`` beside steps and evaluations: a new one is a line of :data:`EVENTS`."""

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict, cast

from .progress import Progress

Type: TypeAlias = type | types.UnionType
# more tasks than these are not listed on the terminal
LISTED_TASKS = 8
# more samples than these of a bad step are not listed on the terminal
LISTED_SAMPLES = 3


class EventRecord(TypedDict):
    """The part that all events have in ``metrics.jsonl``; :data:`EVENTS` has the fields of each."""

    kind: Literal["event"]
    event: str
    step: int
    consumed_samples: int


@dataclasses.dataclass(frozen=True)
class Field:
    """One entry of an event: its name, its type and its meaning; an ``optional`` one may be absent."""

    name: str
    type: Type
    meaning: str
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Event:
    """A kind of event.

    Attributes:
        occurs: when it occurs.
        fields: its fields beside those of :class:`EventRecord`.
        text: makes the text on the terminal of its fields; ``None`` for all of them by name.
    """

    occurs: str
    fields: tuple[Field, ...]
    text: Callable[[Mapping[str, Any]], str] | None = None

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


def _epoch_text(epoch: Mapping[str, Any]) -> str:
    samples = sum(task["samples"] for task in epoch["tasks"].values())
    left_out = sum(task.get("left_out", 0) for task in epoch["tasks"].values())
    proved = "used exactly as planned" if epoch["complete"] else "counted in part, not judged"
    but = f", but for {left_out:,} that bad steps left out" if left_out else ""
    return f"epoch {epoch['epoch']} is over | {samples:,} samples, {proved}{but}"


def _bad_step_text(step: Mapping[str, Any]) -> str:
    return f"bad step | {step['reason']} | {step['action']} | {samples_text(step['samples'], step['slices'])}"


def samples_text(samples: Sequence[Mapping[str, Any]], slices: Mapping[str, int]) -> str:
    """Name the samples of a bad step with the largest losses, or those whose losses are not finite.

    Args:
        samples: of the event "bad step".
        slices: of the same event.
    """
    named = ", ".join(
        f"task {sample['task']} sample {sample['sample']} in pack {sample['pack']} ({_number(sample['loss'])})"
        for sample in suspects(samples)
    )
    if slices["not_finite"]:
        return f"losses of {slices['not_finite']:,} of {slices['all']:,} samples are not finite: {named}"
    return f"largest losses: {named}" if named else "no sample of this batch has a loss"


def suspects(samples: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The first samples of a bad step whose losses are not finite, or if there are none the first ones."""
    return ([sample for sample in samples if isinstance(sample["loss"], str)] or samples)[:LISTED_SAMPLES]


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _warning_text(warning: Mapping[str, Any]) -> str:
    tasks = warning.get("tasks", [])
    named = [*tasks[:LISTED_TASKS], *([f"{len(tasks) - LISTED_TASKS} more"] if len(tasks) > LISTED_TASKS else [])]
    return f"warning | reason {warning['reason']}" + (f" | tasks {', '.join(named)}" if tasks else "")


def _load_text(load: Mapping[str, Any]) -> str:
    words = [f"{name} {value}" for name, value in load.items() if name not in ("differs", "instead_of")]
    if "differs" in load:
        words.append(f"differs from the run that was saved: {'; '.join(load['differs'])}")
    return " | ".join(["load", *words])


_REASON = Field("reason", str, "why, with the option that decided it")
EVENTS: Mapping[str, Event] = {
    "load": Event(
        "the run starts from a checkpoint or a model",
        (
            Field("path", str, "folder of the checkpoint or model"),
            Field("finetune", bool, "whether only its weights are used, and training starts at step 0"),
            Field("adapter", str, "folder of the adapter in Hugging Face's format", optional=True),
            Field("base", str, "folder of the model that the adapters in path belong to", optional=True),
            Field("differs", list, "what differs from the run that was saved, in words", optional=True),
            Field("instead_of", list, "what is wrong with each newer checkpoint; else absent", optional=True),
        ),
        _load_text,
    ),
    "save": Event(
        "a checkpoint is complete",
        (
            Field("path", str, "its folder"),
            Field("seconds", float, "time from the start of the save until it was complete"),
            Field("best", bool, "true if it has the best evaluation so far; else absent", optional=True),
        ),
    ),
    "save failed": Event(
        "a checkpoint could not be written; the one before is still the newest, and the run goes on",
        (
            Field("path", str, "the folder that it would have had"),
            _REASON,
            Field("failures", int, "saves that failed since the last one that did not"),
            Field("next", int | None, "step of the next attempt; null if that is the next save that is asked for"),
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
    "bad step": Event(
        "the numbers of a step are not finite or jump, and it updated nothing",
        (
            _REASON,
            Field("action", str, "what becomes of it"),
            Field("packs", int, "packs of its global batch"),
            Field(
                "samples",
                list,
                "samples with the largest losses: task, sample, pack, first_token of the slice, tokens (supervised) "
                'and loss, which is "nan" or "inf" where it is not finite',
            ),
            Field("slices", dict, "sample slices of the batch that supervise a token: all, and not_finite"),
        ),
        _bad_step_text,
    ),
    "rollback": Event(
        "the run goes back to a checkpoint, because a step was bad; steps after it come again",
        (
            Field("path", str, "folder of the checkpoint"),
            Field("from_step", int, "the bad step"),
        ),
    ),
    "warning": Event(
        "something deserves attention",
        (_REASON, Field("tasks", list, "names of the tasks concerned", optional=True)),
        _warning_text,
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
            Field(
                "tasks",
                dict,
                "by name: samples, how many sample slices were used, and digest of which; left_out, how many others "
                "bad steps left out, if any",
            ),
            Field("complete", bool, "whether all of it was counted and is proved to be as planned"),
        ),
        _epoch_text,
    ),
    "early stop": Event("early stopping ends the run", (_REASON,)),
    "exit": Event("the run ends before its last step", (_REASON,)),
}


def event_record(progress: Progress, event: str, **details: object) -> EventRecord:
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
    common: EventRecord = {
        "kind": "event",
        "event": event,
        "step": progress.step,
        "consumed_samples": progress.consumed_samples,
    }
    # the table, not the type, knows the fields of each event
    return cast(EventRecord, {**common, **details})


def event_text(record: EventRecord) -> str:
    """The text of an event on the terminal."""
    details = {name: value for name, value in record.items() if name not in EventRecord.__annotations__}
    text = EVENTS[record["event"]].text
    return text(details) if text else " | ".join([record["event"], *(f"{name} {details[name]}" for name in details)])
