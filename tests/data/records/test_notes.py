"""Counts of keys and kinds become one line each."""

import pytest

from mft_megatron.data.records import notes


def test_each_count_is_one_line(monkeypatch):
    monkeypatch.setitem(notes.NOTES, "trimmed", "the template removed leading spaces of {n} answers")
    assert notes.note_lines("qa", {"topic": 10000, "messages[].id": 1}, {"trimmed": 1234}) == [
        "task qa: 10,000 records have a key 'topic' that is not read",
        "task qa: 1 record has a key 'messages[].id' that is not read",
        "task qa: the template removed leading spaces of 1,234 answers",
    ]


def test_kinds_of_a_later_version_are_shown_by_name():
    assert notes.note_lines("qa", {}, {"a kind of later": 3}) == ["task qa: a kind of later: 3"]


@pytest.mark.parametrize("kind", notes.NOTES)
def test_each_sentence_says_the_number(kind):
    assert "123" in notes.NOTES[kind].format(n="123")


@pytest.mark.parametrize("kind", notes.NOTES)
def test_one_is_not_written_as_several(kind):
    (line,) = notes.note_lines("qa", {}, {kind: 1})
    assert "1 answers" not in line
    assert "1 records" not in line


def test_very_many_and_very_long_keys_stay_readable():
    lines = notes.note_lines("qa", {f"{n:02}" + "x" * 1000: 1 for n in range(32)}, {}, {"00" + "x" * 1000})
    assert len(lines) == 21
    assert lines[0] == f"task qa: 1 record has a key '01{'x' * 78}…' that is not read"
    assert lines[20] == "task qa: 11 more keys are not read; the ledger counts the records of each"
