"""MMIDIDX files: we and Megatron-Core read what the other writes; damaged files are refused by name."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mft_megatron.data.storage.indexed_dataset import IndexedDataset, IndexedDatasetWriter, token_dtype
from mft_megatron.errors import InputError


def write(prefix, sequences, dtype, at_once=2):
    writer = IndexedDatasetWriter(prefix.with_suffix(".bin"), prefix.with_suffix(".idx"), dtype)
    for start in range(0, len(sequences), at_once):
        block = sequences[start : start + at_once]
        writer.add(np.concatenate(block), np.array([len(sequence) for sequence in block], np.int32))
    writer.finish()
    return prefix


def some_sequences(dtype, count=7):
    random = np.random.default_rng(0)
    return [random.integers(0, np.iinfo(dtype).max, random.integers(1, 30), dtype, endpoint=True) for _ in range(count)]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_megatron_core_reads_it(tmp_path, dtype):
    import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

    from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset

    sequences = some_sequences(dtype)
    theirs = MegatronDataset(str(write(tmp_path / "d", sequences, dtype)))
    assert theirs.index.dtype == dtype
    assert theirs.document_indices.tolist() == list(range(len(sequences) + 1))
    for sequence, expected in zip(theirs, sequences, strict=True):
        np.testing.assert_array_equal(sequence, expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_we_read_what_megatron_core_writes(tmp_path, dtype):
    import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    sequences = some_sequences(dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=dtype)
    for sequence in sequences:
        builder.add_document(torch.from_numpy(sequence.astype(np.int64)), [len(sequence)])
    builder.finalize(str(tmp_path / "d.idx"))
    ours = IndexedDataset(tmp_path / "d")
    assert len(ours) == len(sequences)
    for number, expected in enumerate(sequences):
        np.testing.assert_array_equal(ours[number], expected)
    # and byte for byte the same files
    write(tmp_path / "ours", sequences, dtype)
    for end in (".bin", ".idx"):
        assert (tmp_path / f"ours{end}").read_bytes() == (tmp_path / f"d{end}").read_bytes()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=9), max_size=9), st.integers(1, 4))
def test_round_trip(tmp_path_factory, sequences, at_once):
    prefix = tmp_path_factory.mktemp("index") / "d"
    write(prefix, [np.array(sequence, np.uint16) for sequence in sequences], np.uint16, at_once)
    read = IndexedDataset(prefix)
    assert [read[number].tolist() for number in range(len(read))] == sequences


def test_ids_take_two_bytes_where_they_fit():
    assert token_dtype(2**16) == np.uint16
    assert token_dtype(2**16 + 1) == np.int32


def test_lengths_must_add_up(tmp_path):
    writer = IndexedDatasetWriter(tmp_path / "d.bin", tmp_path / "d.idx", np.uint8)
    with pytest.raises(ValueError, match=r"3 items.*2"):
        writer.add(np.zeros(3, np.uint8), np.array([2], np.int32))
    writer.close()


@pytest.fixture
def written(tmp_path):
    return write(tmp_path / "d", some_sequences(np.uint16), np.uint16)


@pytest.mark.parametrize("end", ["bin", "idx"])
@pytest.mark.parametrize("change", ["missing", "empty", "one byte less", "one byte more", "half"])
def test_damaged_files_are_refused_by_name(written, end, change):
    path = written.with_suffix(f".{end}")
    content = path.read_bytes()
    if change == "missing":
        path.unlink()
    else:
        changed = {"empty": b"", "one byte less": content[:-1], "one byte more": content + b"\0"}
        path.write_bytes(changed.get(change, content[: len(content) // 2]))
    with pytest.raises(InputError, match=rf"d\.{end}"):
        IndexedDataset(written)


@pytest.mark.parametrize(
    ("offset", "message"), [(0, "not an MMIDIDX"), (9, "version"), (17, "type"), (18, "sequences")]
)
def test_every_field_of_the_header_is_checked(written, offset, message):
    path = written.with_suffix(".idx")
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x55
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        IndexedDataset(written)
