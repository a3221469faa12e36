"""Files that hold one JSON array: every item whole, nothing passed over, and damage named."""

import gzip
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_megatron.data.tasks.json_array import items_of_array, starts_with_array
from mft_megatron.data.tasks.reader import TaskReader
from mft_megatron.errors import InputError

texts = st.text(max_size=8) | st.sampled_from(['"', "\\", '\\"', "[", "]", "{", "}", ",", '[{"', "\\\\", "é\u2028\n"])
values = st.recursive(
    texts | st.integers() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def in_blocks(content, size):
    return (content[start : start + size] for start in range(0, len(content), size))


@given(
    st.lists(st.dictionaries(texts, values, max_size=3) | st.lists(values, max_size=2), max_size=5),
    st.sampled_from([None, 1, "\t"]),
    st.booleans(),
    st.integers(1, 40),
    st.sampled_from(["", "\ufeff", " \r\n"]),
)
@settings(deadline=None, max_examples=300)
def test_the_items_are_those_of_the_array_however_it_is_written_and_cut(items, indent, ascii_only, size, before):
    content = (before + json.dumps(items, indent=indent, ensure_ascii=ascii_only) + "\n").encode()
    is_array, blocks = starts_with_array(iter(in_blocks(content, size)))
    assert is_array
    assert [json.loads(item) for item in items_of_array(blocks, "f")] == items


@given(st.lists(st.dictionaries(texts, values, max_size=2), min_size=1, max_size=3), st.data())
@settings(deadline=None, max_examples=200)
def test_an_array_that_is_cut_off_is_refused(items, data):
    content = json.dumps(items).encode()
    end = data.draw(st.integers(1, len(content) - 1))
    with pytest.raises(InputError, match=r"^f: cut off, its array has no end after record \d; make the file again$"):
        list(items_of_array(in_blocks(content[:end], data.draw(st.integers(1, 9))), "f"))


@pytest.mark.parametrize(
    ("content", "items"),
    [
        (b'[1, {"a": 2}, 3, 4, "x]", [5]]', [b"1", b'{"a": 2}', b'3, 4, "x]"', b"[5]"]),
        (b"[null]", [b"null"]),
        (b'["{"]', [b'"{"']),
        (b"[]", []),
        (b"[ , ]", []),
        (b"[{}{},]", [b"{}", b"{}"]),
        (b'[{"a": [}], {}]', [b'{"a": [}]', b"{}"]),
    ],
)
def test_values_that_are_no_records_are_items_too(content, items):
    for size in range(1, len(content) + 1):
        assert list(items_of_array(in_blocks(content, size), "f")) == items


@pytest.mark.parametrize("after", [b"]", b"{}", b'{"a": 1}\n', b"x", b'"'])
def test_what_follows_the_array_is_refused(after):
    for size in range(1, 9):
        with pytest.raises(InputError, match="f: something follows the end of its array"):
            list(items_of_array(in_blocks(b"[{}]\n" + after + b"\n", size), "f"))


RECORDS = [{"text": f"record {n}\n" + "x" * (n % 50)} for n in range(9000)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("compress", [None, gzip.compress])
def test_a_json_file_is_read_in_batches_of_records_with_numbers(tmp_path, indent, compress):
    path = tmp_path / ("a.json" if compress is None else "a.json.gz")
    content = json.dumps(RECORDS, indent=indent).encode()
    path.write_bytes(content if compress is None else compress(content))
    reader = TaskReader(path)
    batches = list(reader.batches(20_000))
    assert [json.loads(line) for batch in batches for line in batch.lines] == RECORDS
    assert all(sum(map(len, batch.lines)) < 25_000 for batch in batches)
    assert [batch.first_line for batch in batches] == [
        1 + before for before in itertools.accumulate((len(batch.lines) for batch in batches[:-1]), initial=0)
    ]
    assert {batch.of_array for batch in batches} == {True}
    assert (reader.entry().lines, reader.entry().size) == (9000, path.stat().st_size)


def test_a_json_file_may_hold_lines(tmp_path):
    lines = [json.dumps(record).encode() + b"\n" for record in RECORDS[:5]]
    (tmp_path / "a.json").write_bytes(b"\n" + b"".join(lines))
    (batch,) = TaskReader(tmp_path / "a.json").batches()
    assert (batch.lines, batch.first_line, batch.of_array) == ([b"\n", *lines], 1, False)
    (tmp_path / "b.json").write_bytes(b" \n")
    assert [batch.lines for batch in TaskReader(tmp_path / "b.json").batches()] == [[b" \n"]]
    (tmp_path / "c.json").write_bytes(b"")
    assert list(TaskReader(tmp_path / "c.json").batches()) == []
