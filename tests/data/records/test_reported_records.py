"""Records that users of this field reported as read wrongly or silently in part, and what they must become."""

import json
from pathlib import Path

import pytest

from mft_megatron.data.chat_templates.builtin_formats import FORMATS, BuiltInFormat
from mft_megatron.data.records.conversation import Conversation, RecordError, Turn
from mft_megatron.data.records.notes import RecordNotes
from mft_megatron.data.records.record_formats import read_record

CASES = [json.loads(line) for line in Path(__file__).with_name("reported_records.jsonl").read_text().splitlines()]
NAMES = [case["name"] for case in CASES]


@pytest.mark.parametrize("case", [case for case in CASES if "turns" in case], ids=lambda case: case["name"])
def test_reported_records_are_read_whole(case):
    notes = RecordNotes()
    conversation = read_record(case["record"], "auto", notes)
    turns = tuple(
        Turn(role, content, *learn[:1], *map(tuple, learn[1:2]), *learn[2:]) for role, content, *learn in case["turns"]
    )
    assert conversation == Conversation(turns, tools=tuple(case.get("tools", ())))
    assert notes.unread_keys == {key: 1 for key in case.get("unread", [])}
    style = BuiltInFormat("chatml", FORMATS["chatml"].markers, "<|endoftext|>")
    segments = style.segments(conversation, notes)
    assert "".join(segment.text for segment in segments if segment.supervised) == case["supervised"]
    assert notes.kinds == case.get("kinds", {})
    text = "".join(segment.text for segment in segments)
    assert all(json.dumps(tool) in text for tool in case.get("tools", ()))


@pytest.mark.parametrize("case", [case for case in CASES if "refused" in case], ids=lambda case: case["name"])
def test_reported_records_are_refused_by_the_keys_name(case):
    reason, key = case["refused"]
    with pytest.raises(RecordError, match=rf"^{key} .*--ignore-keys {key} ") as caught:
        read_record(case["record"])
    assert caught.value.reason == reason
