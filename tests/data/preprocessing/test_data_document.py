"""Examples and tables of docs/DATA.md: each record is packed or refused as the document says."""

import json
import re

import pytest

from mft_megatron.data.records.conversation import RecordError
from mft_megatron.data.records.known_keys import (
    FLAGS,
    LABELS,
    PASSAGES,
    REFUSED,
    REFUSED_IN_TURNS,
    SYSTEM,
    TOOLS,
    WEIGHTS,
)
from mft_megatron.data.records.notes import NOTES, RecordNotes
from mft_megatron.data.records.record_formats import RECORD_FORMATS, read_record
from mft_megatron.data.tasks.task_files import SUFFIXES
from tests.ranks import ROOT

TEXT = (ROOT / "docs/DATA.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*)\n((?:(?!^## ).*\n)*)", TEXT, re.MULTILINE))
EXAMPLES = [
    (section, json.loads(line))
    for section, content in SECTIONS.items()
    for block in re.findall(r"```json\n(.*?)```", content, re.DOTALL)
    for line in block.splitlines()
]
REFUSED_HERE = "What refuses a record"


def test_every_example_is_packed_as_a_task_file(make_dataset):
    records = [record for section, record in EXAMPLES if section != REFUSED_HERE]
    _, ledger = make_dataset({"examples": records})
    (task,) = ledger.tasks
    assert task.kept == len(records) > 12
    assert (task.dropped, task.unread_keys) == ({}, {})


def test_every_shape_has_an_example():
    found = {
        name
        for section, record in EXAMPLES
        for name, one in RECORD_FORMATS.items()
        if all(any(key in record for key in group) for group in one.keys)
    }
    assert found == set(RECORD_FORMATS)
    assert all(f"`{name}`" in SECTIONS["Shapes of records"] for name in RECORD_FORMATS)


@pytest.mark.parametrize("record", [record for section, record in EXAMPLES if section == REFUSED_HERE])
def test_examples_of_refusals_are_refused(record):
    with pytest.raises(RecordError):
        read_record(record)


def test_every_known_key_and_ending_is_in_the_document():
    known = [*FLAGS, *WEIGHTS, *LABELS, *PASSAGES, *REFUSED, *REFUSED_IN_TURNS, *SYSTEM, *TOOLS, *SUFFIXES]
    assert [key for key in known if f"`{key}`" not in TEXT] == []
    assert [kind for kind in NOTES if f"`{kind}`" not in SECTIONS["What is counted"]] == []


# ---------------------------------------------------------------------------------------------------------------- table

ROWS = re.findall(
    r"^\| ([\w-]+) \| `([^`]+)` \| `([^`]+)` \| (read|counted|refused)\b", SECTIONS["Keys of other tools"], re.MULTILINE
)


def base(tool):
    """A record as a tool's documentation has it, of two rounds where it has rounds."""
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant")] * 2
    return {
        "MFTCoder": {"chat_rounds": [{**turn, "role": turn["role"]} for turn in turns]},
        "ms-swift": {"query": "q", "response": "a"},
        "LLaMA-Factory": {"instruction": "q", "output": "a"},
        "Dolly": {"instruction": "q", "response": "a"},
        "TRL": {"prompt": turns[:1], "completion": turns[1:2]},
        "NeMo": {"conversations": turns},
    }.get(tool, {"messages": turns})


def outcome(tool, path, value):
    """Fate of a key in a record: read, counted or refused."""
    holder, _, key = path.rpartition("[].")
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    record = {holder: turns} if holder else base(tool)
    before = read_record(record)
    (turns[1] if holder else record)[key] = value
    notes = RecordNotes()
    try:
        after = read_record(record, "auto", notes)
    except RecordError as error:
        return "refused" if f"--ignore-keys {path} " in str(error) else str(error)
    if notes.unread_keys:
        assert notes.unread_keys == {path: 1}
        assert after == before
        return "counted"
    assert after != before or (key == "mask" and not holder)
    return "read"


@pytest.mark.parametrize(("tool", "path", "value", "becomes"), ROWS)
def test_each_row_of_the_table_is_true(tool, path, value, becomes):
    assert outcome(tool, path, json.loads(value)) == becomes


def test_the_table_has_every_tool_and_no_row_is_passed_over():
    rows = [line for line in SECTIONS["Keys of other tools"].splitlines() if line.startswith("| ")]
    assert len(ROWS) == len(rows) - 1
    assert {"MFTCoder", "ms-swift", "LLaMA-Factory", "axolotl", "TRL", "NeMo", "OpenAI"} <= {row[0] for row in ROWS}
