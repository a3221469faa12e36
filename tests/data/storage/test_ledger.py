"""The ledger: JSON gives it back unchanged, its hash identifies the content, and a damaged one is refused."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from mft_megatron.data.chat_templates.trained_format import trained_format
from mft_megatron.data.storage import sample_writer
from mft_megatron.data.storage.ledger import FORMAT_VERSION, file_sha256, read_ledger
from mft_megatron.data.storage.sample_writer import TaskTally
from mft_megatron.errors import InputError


@pytest.fixture(scope="module")
def dataset_with_ledger(make_dataset):
    return make_dataset()


def test_round_trip(dataset_with_ledger, tmp_path):
    prefix, ledger = dataset_with_ledger
    assert read_ledger(prefix) == ledger
    (tmp_path / "copy_dataset.json").write_text(ledger.to_json())
    assert read_ledger(tmp_path / "copy") == ledger


def test_every_file_is_in_it_with_its_hash(dataset_with_ledger):
    prefix, ledger = dataset_with_ledger
    folder = Path(prefix).parent
    files = {path.name for path in folder.iterdir() if path.name.startswith("set_")}
    assert files == {f"set{end}" for end in ledger.arrays} | {"set_dataset.json"}
    for end, entry in ledger.arrays.items():
        path = Path(prefix + end)
        assert (path.stat().st_size, file_sha256(path)) == (entry.size, entry.sha256)


def test_the_hash_depends_on_content_and_not_on_paths(make_dataset, dataset_with_ledger):
    ledger = dataset_with_ledger[1]
    assert make_dataset()[1].dataset_hash(256) == ledger.dataset_hash(256)
    assert make_dataset(seed=99)[1].dataset_hash(256) != ledger.dataset_hash(256)
    end, entry = next(iter(ledger.arrays.items()))
    changed = {**ledger.arrays, end: dataclasses.replace(entry, sha256="0" * 64)}
    assert dataclasses.replace(ledger, arrays=changed).dataset_hash(256) != ledger.dataset_hash(256)
    renamed = [dataclasses.replace(ledger.tasks[0], name="renamed"), *ledger.tasks[1:]]
    assert dataclasses.replace(ledger, tasks=renamed).dataset_hash(256) != ledger.dataset_hash(256)
    elsewhere = dataclasses.replace(ledger.tokenizer, model="/elsewhere")
    assert dataclasses.replace(ledger, tokenizer=elsewhere).dataset_hash(256) == ledger.dataset_hash(256)


def test_the_hash_of_a_file_covers_all_of_it(tmp_path):
    content = bytes(range(256)) * (3 << 12) + b"end"  # 3 MiB and a rest
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_missing_ledger_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"x_dataset\.json.*--output-prefix"):
        read_ledger(tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "not JSON"),
        (lambda text: "", "not JSON"),
        (lambda text: "[]", "format version None"),
        (lambda text: "{}", "format version None"),
        (lambda text: text.replace(f'"format_version": {FORMAT_VERSION}', '"format_version": 99'), "99.*reads 2, 3, 4"),
        (lambda text: text.replace('"arrays"', '"array"'), "damaged ledger.*arrays"),
        (lambda text: text.replace('"fill"', '"filled"', 1), "damaged ledger.*`fill`"),
        (lambda text: json.dumps({**json.loads(text), "tasks": 3}), "damaged ledger"),
        (lambda text: json.dumps({**json.loads(text), "packs": {"256": None}}), "damaged ledger"),
        (lambda text: b"\xff\xfe", "not JSON"),
    ],
)
def test_a_damaged_ledger_is_refused_by_name(dataset_with_ledger, tmp_path, change, message):
    path = tmp_path / "x_dataset.json"
    shutil.copy(f"{dataset_with_ledger[0]}_dataset.json", path)
    changed = change(path.read_text())
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    with pytest.raises(InputError, match=rf"x_dataset\.json: .*{message}"):
        read_ledger(tmp_path / "x")


def test_a_ledger_of_version_2_is_read_and_keeps_its_hash(dataset_with_ledger, tmp_path):
    content = json.loads(dataset_with_ledger[1].to_json())
    content["format_version"] = 2
    del content["chat_template"]["sources"]
    new = ("unread_keys", "noted", "chats", "examples", "added")
    for task in content["tasks"]:
        for name in new:
            del task[name]
    (tmp_path / "old_dataset.json").write_text(json.dumps(content))
    old = read_ledger(tmp_path / "old")
    assert [[getattr(task, name) for name in new] for task in old.tasks] == [[{}, {}, None, [], 0]] * len(old.tasks)
    assert trained_format(old) is None
    # its arrays are the same: a run that resumes recognises a data set that is made again, and keeps the order
    assert old.dataset_hash(256) == dataset_with_ledger[1].dataset_hash(256)


def test_very_many_keys_that_nothing_reads_are_one_count(monkeypatch):
    tally = TaskTally("t", {})
    tally.unread_keys.update({"often": 9, "b": 2, "a": 2, "c": 1, "d": 1})
    assert tally.entry().unread_keys == {"a": 2, "b": 2, "c": 1, "d": 1, "often": 9}
    monkeypatch.setattr(sample_writer, "MOST_KEYS", 2)
    assert list(tally.entry().unread_keys.items()) == [("a", 2), ("often", 9), ("(other keys)", 4)]
    merged = TaskTally("t", {})
    for _ in range(2):
        merged.unread_keys.update(tally.entry().unread_keys)
    assert merged.entry().unread_keys == {"a": 4, "often": 18, "(other keys)": 8}
