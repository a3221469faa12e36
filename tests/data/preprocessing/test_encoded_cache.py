"""Cached batches are read by content, and never when they are damaged or of another content."""

import collections
import dataclasses
import json

import numpy as np
import pytest

from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.preprocessing.encoded_batch import Drop, EncodedBatch
from mft_megatron.data.preprocessing.encoded_cache import EncodedCache
from mft_megatron.data.preprocessing.encoding import Encoder
from mft_megatron.data.records.notes import RecordNotes
from mft_megatron.data.tasks.record_batches import RecordBatch
from mft_megatron.errors import InputError

ENCODED = EncodedBatch(
    ids=np.array([5, 6, 7], np.int32),
    mask=np.array([0, 1, 1], np.uint8),
    lengths=np.array([3], np.int32),
    records=2,
    documents=0,
    drops=[Drop("a", 12, "wrong_type", "text must be a string")],
    filled=1,
    notes=RecordNotes(collections.Counter({"topic": 2, "messages[].ä": 1}), collections.Counter(kind=3)),
    chats=4,
    examples=[{"sample": 0, "prompt": "ä\ud83d"}],
    added=5,
)
BATCH = RecordBatch("a", 11, [b'{"text": "x"}\n', b'{"text": 3}\n'])


def assert_same(one, other):
    for field in dataclasses.fields(EncodedBatch):
        first, second = getattr(one, field.name), getattr(other, field.name)
        np.testing.assert_equal(first, second)
        assert type(first) is type(second)
        assert getattr(first, "dtype", None) == getattr(second, "dtype", None)


def test_an_entry_is_read_as_it_was_written_with_the_lines_of_the_new_batch(tmp_path):
    cache = EncodedCache(tmp_path / "cache")
    key = cache.key(BATCH, "how")
    assert cache.read(key, BATCH) is None
    cache.write(key, BATCH, ENCODED)
    assert_same(cache.read(key, BATCH), ENCODED)
    elsewhere = RecordBatch("b", 101, BATCH.lines)
    assert cache.key(elsewhere, "how") == key
    assert cache.read(key, elsewhere).drops == [Drop("b", 102, "wrong_type", "text must be a string")]
    assert cache.reused == 2
    of_array = RecordBatch("a", 11, BATCH.lines, True)
    cache.write(cache.key(of_array, "how"), of_array, ENCODED)
    (drop,) = cache.read(cache.key(of_array, "how"), of_array).drops
    assert drop.position == "a: record 12"
    cache.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("largest", [0, 65535, 65536, 2**31 - 1])
@pytest.mark.parametrize("length", [0, 2, 8, 13])
def test_any_ids_and_masks_are_read_as_they_were_written(tmp_path, largest, length):
    cache = EncodedCache(tmp_path)
    ids = np.full(length, largest, np.int32)
    mask = (np.arange(length) % 3 == 1).astype(np.uint8)
    encoded = dataclasses.replace(ENCODED, ids=ids, mask=mask, lengths=np.array([length], np.int32))
    cache.write("key", BATCH, encoded)
    assert_same(cache.read("key", BATCH), encoded)


def test_other_content_and_other_encodings_have_other_keys():
    cache = EncodedCache(None)
    rows = RecordBatch("a", 1, [{"text": "x"}])
    keys = [cache.key(BATCH, "how"), cache.key(BATCH, "else"), cache.key(rows, "how")]
    others = [b"x\n"], [b"y\n"], [b"x\n", b"\n"], [b"\n", b"x\n"], []
    keys += [cache.key(RecordBatch("a", 1, lines), "how") for lines in others]
    cuts = ([b"{\n", b"}{}"], False), ([b"{\n}", b"{}"], True)
    keys += [cache.key(RecordBatch("a", 1, lines, of_array), "how") for lines, of_array in cuts]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-20], lambda b: b"", lambda b: b.replace(b"\x05\0\0\0", b"\x09\0\0\0")]
)
def test_a_damaged_entry_is_not_read(tmp_path, damage):
    cache = EncodedCache(tmp_path)
    key = cache.key(BATCH, "how")
    cache.write(key, BATCH, ENCODED)
    (path,) = tmp_path.rglob("*.npz")
    content = path.read_bytes()
    assert damage(content) != content
    path.write_bytes(damage(content))
    assert cache.read(key, BATCH) is None
    assert cache.reused == 0
    assert not path.exists()


# ------------------------------------------------------------------------------------------------ through preprocess


@pytest.fixture
def encoded_texts(monkeypatch):
    """Record the lines that are encoded, not read from the cache."""
    lines = []
    encode = Encoder.encode

    def counting(self, task, batch):
        lines.extend(batch.lines)
        return encode(self, task, batch)

    monkeypatch.setattr(Encoder, "encode", counting)
    return lines


def records(*texts):
    return [{"text": text} for text in texts]


def test_only_an_added_task_is_tokenised(make_dataset, tmp_path, encoded_texts):
    cache = tmp_path / "cache"
    first = {"a": records("x = 1", "y = 2")}
    make_dataset(first, cache_dir=cache, split=(1, 0, 0))
    assert len(encoded_texts) == 2
    both = {**first, "b": records("z = 3")}
    _, ledger = make_dataset(both, cache_dir=cache, split=(1, 0, 0))
    assert [json.loads(line)["text"] for line in encoded_texts[2:]] == ["z = 3"]
    _, expected = make_dataset(both, split=(1, 0, 0))
    assert ledger.arrays == expected.arrays
    make_dataset(both, cache_dir=cache, split=(1, 0, 0), chat_template="mftcoder")
    assert len(encoded_texts) == 9  # 3, then 3 for the comparison, and 3 that are encoded another way


def test_a_killed_run_continues_from_the_cache(make_dataset, tmp_path, encoded_texts, monkeypatch):
    from mft_megatron.data.preprocessing import preprocess as module

    tasks = {"a": records("x = 1", "y = 2"), "b": records("z = 3")}

    class Killed(BaseException):
        """No handler of ``Exception`` runs, as when a process is killed."""

    def die(self, *_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module.SampleWriter, "finish", die)
        with pytest.raises(Killed):
            make_dataset(tasks, output_prefix=tmp_path / "set", split=(1, 0, 0))
    assert not list(tmp_path.glob("set*"))
    before = len(encoded_texts)
    prefix, ledger = make_dataset(tasks, output_prefix=tmp_path / "set", split=(1, 0, 0))
    assert len(encoded_texts) == before
    assert ledger.arrays == make_dataset(tasks, split=(1, 0, 0))[1].arrays
    PackedDataset.open(prefix, 256, check="hashes")
    assert {path.name for path in tmp_path.iterdir()} == {f"set{end}" for end in (*ledger.arrays, "_dataset.json")}


def test_a_refused_run_leaves_no_cache_unless_it_is_large(make_dataset, tmp_path, monkeypatch):
    tasks = {"a": records("x"), "b": []}
    with pytest.raises(InputError, match=r"or leave the task out$"):
        make_dataset(tasks, output_prefix=tmp_path / "set")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("mft_megatron.data.preprocessing.read_input.WORTH_KEEPING", 1)
    with pytest.raises(InputError, match=r"task b .* The same command goes on from 1 encoded batches"):
        make_dataset(tasks, output_prefix=tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == [".set.writing"]
