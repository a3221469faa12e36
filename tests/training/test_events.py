"""The table of events: all that the package writes is in it, and nothing else can be written."""

import ast
import re
from pathlib import Path

import pytest

import mft_megatron
from mft_megatron.training.events import EVENTS, event_record, event_text
from mft_megatron.training.progress import Progress

PACKAGE = Path(mft_megatron.__file__).parent


def calls():
    """Every call of event_record in the package: the names that its event may have, its keywords, and its place."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "event_record":
                event = node.args[1]
                choices = (event.body, event.orelse) if isinstance(event, ast.IfExp) else (event,)
                names = [choice.value for choice in choices if isinstance(choice, ast.Constant)]
                assert len(names) == len(choices), f"{path.name}:{node.lineno}: the event's name is not written out"
                yield names, {keyword.arg for keyword in node.keywords}, f"{path.name}:{node.lineno}"


def test_every_event_that_is_written_is_in_the_table_and_vice_versa():
    assert {name for names, _, _ in calls() for name in names} == set(EVENTS)


def test_calls_give_the_fields_of_their_event():
    for names, keywords, place in calls():
        for name in names:
            fields = {field.name for field in EVENTS[name].fields}
            required = {field.name for field in EVENTS[name].fields if not field.optional}
            # None stands for a dict of details that is unpacked
            assert keywords - {None} <= fields, place
            assert None in keywords or required <= keywords, place


def test_events_are_made_by_their_table_alone():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "events.py":
            assert '"kind": "event"' not in path.read_text(), path


def test_an_event():
    assert event_record(Progress(7, 28), "skip", reason="why", loss_scale=2.0) == {
        "kind": "event",
        "event": "skip",
        "step": 7,
        "consumed_samples": 28,
        "reason": "why",
        "loss_scale": 2.0,
    }


@pytest.mark.parametrize(
    ("event", "details", "text"),
    [
        ("skipped", {"reason": "why"}, "no event 'skipped' in the table"),
        ("skip", {}, "event 'skip': no reason"),
        ("skip", {"reason": "why", "scale": 2.0}, "event 'skip': unknown field scale"),
        ("skip", {"reason": 3}, "event 'skip': reason is 3, not of type"),
        (
            "task early stop",
            {"task": "a", "best_loss": "low", "best_step": None, "weight": 0.0},
            "best_loss is 'low', not of type float | None",
        ),
    ],
)
def test_other_events_and_fields_are_refused(event, details, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        event_record(Progress(), event, **details)


def test_the_text_of_an_event_has_its_fields_or_is_its_own():
    assert event_text(event_record(Progress(), "save", path="run/iter_0000007", seconds=1.5)) == (
        "save | path run/iter_0000007 | seconds 1.5"
    )
    tasks = {"write": {"samples": 1000, "digest": "0a"}, "read": {"samples": 234, "digest": "0b"}}
    for complete, proved in ((True, "used exactly as planned"), (False, "counted in part, not judged")):
        event = event_record(Progress(), "epoch", epoch=3, tasks=tasks, complete=complete)
        assert event_text(event) == f"epoch 3 is over | 1,234 samples, {proved}"


def test_a_warning_lists_few_tasks_on_the_terminal():
    def text(*tasks):
        return event_text(
            event_record(Progress(), "warning", reason="why", **({"tasks": list(tasks)} if tasks else {}))
        )

    assert text() == "warning | reason why"
    assert text("a", "b") == "warning | reason why | tasks a, b"
    assert text(*"abcdefghijk") == "warning | reason why | tasks a, b, c, d, e, f, g, h, 3 more"
