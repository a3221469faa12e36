"""Files of tasks: every kind is read whole, in order and in batches; damaged files are reported; paths become tasks."""

import decimal
import errno
import gzip
import hashlib
import io
import itertools
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_megatron.data.storage.dataset_writer import report_full_disk
from mft_megatron.data.storage.indexed_dataset import IndexedDatasetWriter
from mft_megatron.data.tasks import reader as reader_module
from mft_megatron.data.tasks.reader import TaskReader
from mft_megatron.data.tasks.record_batches import TokenizedBatch
from mft_megatron.data.tasks.task_files import TaskFiles, check_task_name, left_out_lines, parse_tasks
from mft_megatron.errors import InputError
from mft_megatron.parsing import git_lfs
from tests import source_code
from tests.refusals import refused_call

TEXTS = [source_code.module(seed, functions=40) for seed in range(5)]
RECORDS = [{"text": line, "n": number} for text in TEXTS for number, line in enumerate(text.splitlines())]
CONTENT = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
LINE_ENDS = {"LF": CONTENT, "CRLF": CONTENT.replace(b"\n", b"\r\n"), "none at the end": CONTENT.rstrip()}


def compressed(content, suffix):
    return {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}[suffix](content)


def write_lines(folder, suffix, content=CONTENT):
    path = folder / f"lines.jsonl{suffix}"
    path.write_bytes(compressed(content, suffix) if suffix else content)
    return path


def lines_of(path, batch_bytes=5000):
    return [line for batch in TaskReader(path).batches(batch_bytes) for line in batch.lines]


def first_lines(batches):
    """The first line of each batch, counted from the lines of the batches before it."""
    return [1 + sum(len(before.lines) for before in batches[:index]) for index in range(len(batches))]


def check_entry(reader, path, lines):
    entry = reader.entry()
    content = path.read_bytes()
    assert (entry.path, entry.size, entry.lines) == (str(path), len(content), lines)
    assert entry.sha256 == hashlib.sha256(content).hexdigest()
    assert reader.bytes_read == reader.size_on_disk == len(content)


# ---------------------------------------------------------------------------------------------------------------- lines


@settings(deadline=None)
@given(
    st.lists(st.binary(max_size=30) | st.sampled_from([b"\n", b"\r", b"\r\n", b"\n\n", b"\x0c"]), max_size=12),
    st.integers(1, 40),
    st.sampled_from(["", ".gz", ".zst"]),
)
def test_batches_hold_every_line_once(tmp_path_factory, pieces, batch_bytes, suffix):
    content = b"".join(pieces)
    path = write_lines(tmp_path_factory.mktemp("source"), suffix, content)
    reader = TaskReader(path)
    batches = list(reader.batches(batch_bytes))
    lines = [line for batch in batches for line in batch.lines]
    assert b"".join(lines) == content.removeprefix(b"\xef\xbb\xbf")
    assert all(line.count(b"\n") == line.endswith(b"\n") for line in lines)
    assert all(line.endswith(b"\n") for line in lines[:-1])
    assert all(batch.lines for batch in batches)
    assert [batch.first_line for batch in batches] == first_lines(batches)
    check_entry(reader, path, len(lines))


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("content", LINE_ENDS.values(), ids=LINE_ENDS)
def test_records_are_the_same_in_every_kind_of_file(tmp_path, suffix, content):
    path = write_lines(tmp_path, suffix, content)
    reader = TaskReader(path)
    batches = list(reader.batches(5000))
    assert [json.loads(line) for batch in batches for line in batch.lines] == RECORDS
    assert {batch.path for batch in batches} == {str(path)}
    assert len(batches) > 10 or suffix
    check_entry(reader, path, len(RECORDS))


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("batch_bytes", [1, 2, 1 << 20])
def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path, suffix, batch_bytes):
    mark = "\ufeff".encode()
    path = write_lines(tmp_path, suffix, mark + b'{"a": 1}\n' + mark + b'{"a": 2}\n')
    reader = TaskReader(path)
    lines = [line for batch in reader.batches(batch_bytes) for line in batch.lines]
    assert lines == [b'{"a": 1}\n', mark + b'{"a": 2}\n']
    check_entry(reader, path, 2)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_lines_longer_than_a_batch_stay_whole(tmp_path, suffix):
    long = os.urandom(300_000).hex().encode()
    lines = [b"a\n", long + b"\n", b"b\n", long + b"\n", b"c"]
    assert lines_of(write_lines(tmp_path, suffix, b"".join(lines)), 1000) == lines


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_large_line_is_a_batch_alone_and_in_memory_once(tmp_path, suffix, end):
    large, small = os.urandom(2_000_000).hex().encode(), b"a\n" * 70_000
    path = write_lines(tmp_path, suffix, b"".join([small, large, b"\n", small, large, end]))
    held = []
    tracemalloc.start()
    try:
        for batch in TaskReader(path).batches(100_000):
            if len(batch.lines[0]) > 10:
                assert len(batch.lines) == 1
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert len(held) == 2
    assert max(held) < 1.2 * len(large)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_concatenated_members_are_one_file(tmp_path, suffix):
    half = CONTENT[: len(CONTENT) // 2]
    path = tmp_path / f"lines.jsonl{suffix}"
    padding = b"\0" * 100 if suffix == ".gz" else b""
    path.write_bytes(compressed(half, suffix) + compressed(CONTENT[len(half) :], suffix) + padding)
    assert b"".join(lines_of(path)) == CONTENT


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    lines = b"".join(os.urandom(500).hex().encode() + b"\n" for _ in range(10_000))  # 10 MB
    path = write_lines(tmp_path, suffix, lines)
    del lines
    tracemalloc.start()
    try:
        count = sum(len(batch.lines) for batch in TaskReader(path).batches(100_000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 10_000
    assert peak < 2e6


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("keep", [0, 1, 3, 10, 0.5, -1, -9])
def test_compressed_files_that_are_cut_off_are_refused(tmp_path, suffix, keep):
    path = write_lines(tmp_path, suffix)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if 0 < keep < 1 else keep])
    with pytest.raises(InputError, match=rf"^{path}: cut off") as caught:
        lines_of(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["plain", "flipped", "garbage after"])
def test_compressed_files_that_are_damaged_are_refused(tmp_path, suffix, damage):
    path = write_lines(tmp_path, suffix)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    path.write_bytes({"plain": CONTENT, "flipped": content, "garbage after": content + b"garbage" * 5}[damage])
    with pytest.raises(InputError, match=rf"^{path}: (damaged|cut off)") as caught:
        lines_of(path)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------- rows

CALLS = [{"function": {"name": "f", "arguments": '{"x": 1}'}}]
ROWS = [
    {
        "messages": [
            {"role": "user", "content": line},
            {"role": "assistant", "content": None, "tool_calls": CALLS},
            {"role": "tool", "content": "é\x00🙂", "weight": 0},
        ],
        "n": number if number % 3 else None,
        "tags": ["a", None] if number % 2 else [],
    }
    for number, line in enumerate(TEXTS[0].splitlines())
]


def write_table(path, rows=ROWS, **options):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


@pytest.mark.parametrize("batch_bytes", [1, 3000, 1 << 20])
@pytest.mark.parametrize("options", [{"row_group_size": 7}, {"compression": "zstd"}, {"use_dictionary": False}])
def test_rows_of_a_table(tmp_path, batch_bytes, options):
    path = write_table(tmp_path / "rows.parquet", **options)
    reader = TaskReader(path)
    batches = list(reader.batches(batch_bytes))
    rows = [row for batch in batches for row in batch.lines]
    numbers = [batch.first_line for batch in batches]
    assert numbers == first_lines(batches)
    assert len(rows) == len(ROWS)
    for row, given_row in zip(rows, ROWS, strict=True):
        expected = {key: value for key, value in given_row.items() if value is not None}
        expected["messages"] = [
            {key: value for key, value in turn.items() if value is not None} for turn in given_row["messages"]
        ]
        assert row == expected
        assert {type(value) for value in row.values()} <= {list, int}
    check_entry(reader, path, len(ROWS))


def test_maps_are_dicts_and_an_empty_table_has_no_batch(tmp_path):
    import pyarrow
    from pyarrow import parquet

    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    table = pyarrow.table({"turn": pyarrow.array([[("role", "user"), ("content", "a")]], kind)})
    parquet.write_table(table, tmp_path / "maps.parquet")
    assert lines_of(tmp_path / "maps.parquet") == [{"turn": {"role": "user", "content": "a"}}]
    parquet.write_table(table.slice(0, 0), tmp_path / "none.parquet")
    reader = TaskReader(tmp_path / "none.parquet")
    assert list(reader.batches()) == []
    check_entry(reader, tmp_path / "none.parquet", 0)


def test_times_in_tables_are_text(tmp_path):
    import pyarrow
    from pyarrow import parquet

    times = {unit: pyarrow.array([1_234_567_891], pyarrow.timestamp(unit)) for unit in ("ns", "s")}
    times["nowhere"] = pyarrow.array([1_234_567_891], pyarrow.timestamp("us", "Atlantis/Poseidonis"))
    times["null"] = pyarrow.array([None], pyarrow.date32())
    parquet.write_table(pyarrow.table({"a.b": ["x"], **times, "turns": [[{"role": "user"}]]}), tmp_path / "a.parquet")
    assert lines_of(tmp_path / "a.parquet") == [
        {
            "a.b": "x",
            "ns": "1970-01-01 00:00:01.234567891",
            "s": "2009-02-13 23:31:31.000",
            "nowhere": 1_234_567_891,
            "turns": [{"role": "user"}],
        }
    ]


def test_decimals_in_tables_are_numbers(tmp_path):
    import pyarrow
    from pyarrow import parquet

    weights = pyarrow.array([decimal.Decimal("0.5"), None, decimal.Decimal("2")])
    turns = [[{"weight": decimal.Decimal("0.25")}]] * 3
    parquet.write_table(pyarrow.table({"weight": weights, "turns": turns}), tmp_path / "a.parquet")
    lines = lines_of(tmp_path / "a.parquet")
    assert lines == [{"turns": [{"weight": 0.25}]} | weight for weight in ({"weight": 0.5}, {}, {"weight": 2.0})]
    assert type(lines[0]["weight"]) is type(lines[0]["turns"][0]["weight"]) is float


@pytest.mark.parametrize("damage", ["empty", "plain", "cut", "no footer", "flipped"])
def test_tables_that_are_damaged_are_refused(tmp_path, damage):
    path = write_table(tmp_path / "rows.parquet", compression="zstd", write_page_checksum=False)
    content = bytearray(path.read_bytes())
    content[100:140] = bytes(40) if damage == "flipped" else content[100:140]
    damaged = {
        "empty": b"",
        "plain": CONTENT,
        "cut": content[: len(content) // 2],
        "no footer": content[:-8],
        "flipped": content,
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(InputError, match=rf"^{path}: (damaged|cannot be read from row 1 on)") as caught:
        lines_of(path)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------------- tokens


def write_index(prefix, sequences, dtype=np.int32, marks=None):
    writer = IndexedDatasetWriter(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), np.dtype(dtype))
    items = np.concatenate([np.asarray(sequence, dtype) for sequence in sequences]) if sequences else np.empty(0, dtype)
    writer.add(items, np.array([len(sequence) for sequence in sequences], np.int32))
    writer.finish()
    path = Path(f"{prefix}.idx")
    if marks is not None:
        content = path.read_bytes()
        content = content[: 34 + 12 * len(sequences)] + np.array(marks, np.int64).tobytes()
        path.write_bytes(content[:26] + len(marks).to_bytes(8, "little") + content[34:])
    return path


def documents_of(path, batch_bytes=40):
    documents = []
    reader = TaskReader(path)
    for batch in reader.batches(batch_bytes):
        assert isinstance(batch, TokenizedBatch)
        assert (batch.ids.dtype, batch.mask.dtype, batch.lengths.dtype) == (np.int32, np.uint8, np.int32)
        assert batch.first_document == len(documents) + 1
        assert batch.path == str(path)
        assert len(batch.ids) == len(batch.mask) == batch.lengths.sum()
        ends = np.cumsum(batch.lengths)[:-1]
        documents += zip(np.split(batch.ids, ends), np.split(batch.mask, ends), strict=True)
    return [(ids.tolist(), mask.tolist()) for ids, mask in documents], reader.entry()


def hash_of(*files):
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


sequences = st.lists(st.lists(st.integers(0, 60_000), max_size=8), max_size=12)


@settings(deadline=None)
@given(sequences, st.sampled_from([np.uint16, np.int32, np.int64]), st.integers(1, 200), st.data())
def test_documents_are_their_sequences_concatenated(tmp_path_factory, lists, dtype, batch_bytes, data):
    marks = sorted(data.draw(st.lists(st.integers(0, len(lists)), max_size=5)))
    marks = [0, *marks, len(lists)]
    path = write_index(tmp_path_factory.mktemp("tokens") / "d", lists, dtype, marks)
    documents, entry = documents_of(path, batch_bytes)
    expected = [list(itertools.chain(*lists[start:end])) for start, end in itertools.pairwise(marks)]
    assert documents == [(ids, [1] * len(ids)) for ids in expected]
    files = path, path.with_suffix(".bin")
    assert (entry.size, entry.lines) == (sum(file.stat().st_size for file in files), len(expected))
    assert entry.sha256 == hash_of(*files)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("mask_dtype", [np.uint8, np.uint16, np.int64])
def test_pairs_of_mftcoder(tmp_path, dtype, mask_dtype):
    rows = [[5, 6, 7, 0, 0], [9, 8], [4, 4, 4, 4]]
    masks = [[0, 1, 1, 0, 0], [0, 1], [1, 1, 0, 1]]
    path = write_index(tmp_path / "a_input_ids", rows, dtype)
    mask = write_index(tmp_path / "a_loss_mask", masks, mask_dtype)
    documents, entry = documents_of(path)
    assert documents == list(zip(rows, masks, strict=True))
    assert entry.sha256 == hash_of(path, path.with_suffix(".bin"), mask, mask.with_suffix(".bin"))
    assert TaskReader(path).size_on_disk == entry.size


def test_tokens_without_masks_are_all_supervised(tmp_path):
    path = write_index(tmp_path / "a_input_ids", [[1, 2], [3]])
    assert documents_of(path)[0] == [([1, 2], [1, 1]), ([3], [1])]


def test_what_megatron_core_writes_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.uint16)
    builder.add_document(torch.arange(5), [2, 3])
    builder.add_document(torch.arange(4), [4])
    builder.finalize(str(tmp_path / "d.idx"))
    assert documents_of(tmp_path / "d.idx")[0] == [([0, 1, 2, 3, 4], [1] * 5), ([0, 1, 2, 3], [1] * 4)]


def _replace(path, start, values):
    content = bytearray(path.read_bytes())
    content[start : start + len(values)] = values
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda idx: idx.write_bytes(b""), r"a_input_ids.idx: not an MMIDIDX"),
        (lambda idx: idx.write_bytes(CONTENT), r"a_input_ids.idx: not an MMIDIDX"),
        (lambda idx: idx.write_bytes(idx.read_bytes()[:-3]), r"a_input_ids.idx: \d+ bytes"),
        (lambda idx: idx.with_suffix(".bin").write_bytes(b"123"), r"a_input_ids.bin: 3 bytes"),
        (lambda idx: idx.with_suffix(".bin").unlink(), r"a_input_ids.bin: missing"),
        (lambda idx: _replace(idx, 34, b"\xff\xff\xff\xff"), r"a_input_ids.idx: damaged"),
        (lambda idx: _replace(idx, 34 + 12, b"\4"), r"a_input_ids.idx: damaged"),
        (lambda idx: _replace(idx, 34 + 36, b"\2"), r"a_input_ids.idx: damaged"),
        (lambda idx: _replace(idx, 34 + 36 + 8, b"\3"), r"a_input_ids.idx: damaged"),
        (lambda idx: _replace(idx, 34 + 36 + 24, b"\2"), r"a_input_ids.idx: damaged"),
        (lambda idx: _replace(idx.with_suffix(".bin"), 0, b"\xff" * 4), r"a_input_ids.idx: token ids from -1"),
        (lambda idx: write_index(idx.with_suffix(""), [[1.5, 2], [3, 4, 5], [6]], np.float32), r"type float32"),
        (
            lambda idx: write_index(idx.with_name("a_loss_mask"), [[1, 1], [0, 0, 1], [2]]),
            r"a_loss_mask.idx: .* 0 and 1",
        ),
        (lambda idx: write_index(idx.with_name("a_loss_mask"), [[1, 1], [0, 0, 1]]), r"a_loss_mask.idx: its sequences"),
        (lambda idx: write_index(idx.with_name("a_loss_mask"), [[1, 1], [0, 0], [1, 1]]), r"a_loss_mask.idx: its seq"),
    ],
)
def test_token_files_that_are_damaged_are_refused(tmp_path, damage, message):
    path = write_index(tmp_path / "a_input_ids", [[1, 2], [3, 4, 5], [6]])
    write_index(tmp_path / "a_loss_mask", [[1, 1], [0, 0, 1], [1]], np.uint8)
    damage(path)
    with pytest.raises(InputError, match=message) as caught:
        documents_of(path)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------- tasks


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return [folder / name for name in names]


def test_a_folder_stands_for_its_files_and_those_below(tmp_path):
    expected = touch(tmp_path, "a.jsonl", "b/c.parquet", "b/d/e.jsonl.gz", "b/f.jsonl.zst", "g.idx", "h_input_ids.idx")
    touch(tmp_path, "g.bin", "h_loss_mask.idx", "h_loss_mask.bin", "h_input_ids.bin")
    left_out = touch(tmp_path, "b/notes.txt", "data.json", "other.bin", "x.parquet.part")
    touch(tmp_path, ".hidden.jsonl", ".cache/z.jsonl", "b/.git/y.jsonl")
    assert parse_tasks((f"t={tmp_path}",)) == {"t": TaskFiles("t", tuple(expected), left_out=tuple(left_out))}


def test_a_packed_data_set_with_weights_in_a_folder_is_not_read(tmp_path):
    (expected,) = touch(tmp_path, "a.jsonl")
    touch(tmp_path, *(f"set_{name}.idx" for name in ("input_ids", "loss_mask", "token_weights")), "set_dataset.json")
    assert parse_tasks((f"t={tmp_path}",))["t"].files == (expected,)


@pytest.mark.parametrize(
    ("content", "read"),
    [
        (b'[{"text": "a"}]', True),
        (b"\xef\xbb\xbf \r\n[\n]", True),
        (b'{"text": "a"}\n{"text": "b"}\n', True),
        (b'\n{"messages": []}', True),
        (b'\n{"text": "' + b"a" * 70000 + b'"}\n{"text": "b"}', True),
        (b'{"description": "metadata", "features": {}}', False),
        (b'{\n  "text": "a"\n}', False),
        (b'"text"\n', False),
        (b"", False),
        (b"\xff", False),
        (b"{" * 70000, False),
    ],
)
def test_json_files_of_a_folder_are_read_if_they_begin_with_records(tmp_path, content, read):
    lines, other = touch(tmp_path, "a.jsonl", "b.json")
    other.write_bytes(content)
    task = parse_tasks((f"t={tmp_path}",))["t"]
    assert task == (TaskFiles("t", (lines, other)) if read else TaskFiles("t", (lines,), left_out=(other,)))
    assert left_out_lines([task]) == ([] if read else ["task t: 1 file in its folders not read: b.json"])
    # named itself, it is read in any case
    assert parse_tasks((f"t={other}",))["t"].files == (other,)


def test_endings_in_capitals_are_read_alike(tmp_path):
    files = touch(tmp_path, "A.JSONL", "B.Json", "C.JSONL.GZ")
    (index,) = touch(tmp_path, "D.IDX")
    files[0].write_bytes(b'{"text": "a"}\n{"text": "b"}')
    files[1].write_bytes(b'[{"text": "c"}]')
    files[2].write_bytes(gzip.compress(b'{"text": "d"}'))
    task = parse_tasks((f"t={tmp_path}",))["t"]
    assert task == TaskFiles("t", tuple(files), left_out=(index,))
    lines = [line.strip() for file in files for batch in TaskReader(file).batches() for line in batch.lines]
    assert lines == [b'{"text": "%c"}' % letter for letter in b"abcd"]


def test_files_that_are_left_out_are_named_up_to_five(tmp_path):
    files = tuple(tmp_path / f"{n}.txt" for n in range(1234))
    assert left_out_lines([TaskFiles("t", (), left_out=files), TaskFiles("u", ())]) == [
        "task t: 1,234 files in its folders not read: 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 1,229 more"
    ]


def test_links_to_folders_are_followed_once(tmp_path):
    touch(tmp_path, "in/a.jsonl", "other/b.jsonl")
    (tmp_path / "in/up").symlink_to(tmp_path / "in")
    (tmp_path / "in/other").symlink_to(tmp_path / "other")
    expected = (tmp_path / "in/a.jsonl", tmp_path / "in/other/b.jsonl")
    assert parse_tasks((f"t={tmp_path / 'in'}",))["t"].files == expected


def test_files_of_one_name_add_up_in_their_order(tmp_path):
    b, a, c = touch(tmp_path, "b.jsonl", "a.parquet", "c/c.jsonl.gz")
    tasks = parse_tasks((f"t={b}", f"u={a}", f"t={a}", f"t={tmp_path / 'c'}"))
    assert tasks == {"t": TaskFiles("t", (b, a, c)), "u": TaskFiles("u", (a,))}
    assert list(tasks) == ["t", "u"]


def test_a_path_may_hold_an_equals_sign(tmp_path):
    (path,) = touch(tmp_path, "x=y.jsonl")
    assert parse_tasks((f"t={path}",))["t"].files == (path,)


def test_the_prefix_of_tokenised_data_stands_for_their_index(tmp_path):
    plain, pair = touch(tmp_path, "plain.idx", "pair_input_ids.idx")
    assert parse_tasks((f"t={tmp_path / 'plain'}", f"t={tmp_path / 'pair'}"))["t"].files == (plain, pair)


@pytest.mark.parametrize("option", ["name", "=path", "name=", "t=nowhere.jsonl"])
def test_malformed_tasks_are_refused(option):
    with pytest.raises(InputError, match=f"--task {option}"):
        parse_tasks((option,))


@pytest.mark.parametrize("name", ["a,b", " a", "a ", "a\nb", "macro", "objective"])
def test_names_that_other_options_cannot_give_are_refused(tmp_path, name):
    (path,) = touch(tmp_path, "a.jsonl")
    with pytest.raises(InputError, match=r"(?s)--task .*(task name|cannot be called)"):
        parse_tasks((f"{name}={path}",))
    with pytest.raises(InputError, match="empty"):
        check_task_name("", "here")
    with pytest.raises(InputError, match="="):
        check_task_name("a=b", "here")
    check_task_name("C++ (gcc) é", "here")


def test_a_file_that_a_task_has_twice_is_refused(tmp_path):
    (path,) = touch(tmp_path, "d/a.jsonl")
    (tmp_path / "link.jsonl").symlink_to(path)
    for other in (path, tmp_path / "d", tmp_path / "link.jsonl"):
        with pytest.raises(InputError, match=r"already has the file .*a\.jsonl|already has the file .*link"):
            parse_tasks((f"t={path}", f"t={other}"))


def test_paths_that_cannot_be_read_are_refused_by_name(tmp_path):
    touch(tmp_path, "a.bin", "a.csv", "a.json.bz2", "a_input_ids.idx", "a_loss_mask.idx", "f/x.txt", "f/y.json")
    touch(tmp_path, "a_token_weights.idx")
    (tmp_path / "empty").mkdir()
    kinds = r"\.jsonl, \.json \(both also \.gz or \.zst\), \.parquet or \.idx"
    for name, message in {
        "a.csv": rf"a\.csv is of no known kind \({kinds}\)$",
        "a.json.bz2": "name a plain file .json or .jsonl",
        "a.bin": r"give a\.idx, its index",
        "a_loss_mask.idx": r"holds the loss mask; give a_input_ids\.idx",
        "a_token_weights.idx": r"holds weights; give a_input_ids\.idx",
        "f": rf"no {kinds} file there; there is x\.txt, y\.json",
        "empty": "there is no file",
    }.items():
        with pytest.raises(InputError, match=f"--task t={tmp_path / name}: .*{message}"):
            parse_tasks((f"t={tmp_path / name}",))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4540516344\n"


@pytest.mark.parametrize(
    ("name", "pointer"),
    [
        *(
            (f"a{suffix}", f"a{suffix}")
            for suffix in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet", ".idx")
        ),
        ("a_input_ids.idx", "a_input_ids.bin"),
        ("a_input_ids.idx", "a_loss_mask.idx"),
        ("a_input_ids.idx", "a_loss_mask.bin"),
    ],
)
def test_pointers_of_git_lfs_are_named(tmp_path, name, pointer):
    if name != pointer:
        for part in ("a_input_ids", "a_loss_mask"):
            write_index(tmp_path / part, [[1], [0, 1]])
    (tmp_path / pointer).write_text(POINTER)
    line = refused_call(lambda: list(TaskReader(tmp_path / name).batches()))
    assert line.startswith(
        f"{tmp_path / pointer}: is a pointer of Git LFS, not the file itself; in its folder run 'git"
    )


def test_a_pointer_of_git_lfs_in_a_folder_is_not_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(CONTENT)
    (tmp_path / "b.json").write_text(POINTER)
    assert "b.json: is a pointer of Git LFS" in refused_call(parse_tasks, (f"x={tmp_path}",))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("fails", ["at once", "while it is read"])
def test_a_file_that_cannot_be_read_is_not_the_fault_of_the_output_beside_it(tmp_path, monkeypatch, suffix, fails):
    path = write_lines(tmp_path, suffix)

    class Failing(io.FileIO):
        def read(self, size=-1):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def opened(file, *words, **named):
        if fails == "at once":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return Failing(file)

    def read():
        with report_full_disk(tmp_path / "set"):
            return list(TaskReader(path).batches())

    monkeypatch.setattr(git_lfs if fails == "at once" else reader_module, "open", opened, raising=False)
    cause = (
        "permission denied" if fails == "at once" else "Input/output error: the device or the connection to it fails"
    )
    assert refused_call(read) == f"{path}: {cause}; the file cannot be read"
