"""Rows and counts of a packed data set, compared with slow, obvious assembly; files that do not match are refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mft_megatron.data.loading.dataset import PackedDataset, packed_lengths, training_packs
from mft_megatron.errors import InputError
from tests.made_dataset import batch_of_packs


def slow_row(split, pack):
    """(token, label, mask, task, position) of each token of a row, and the lengths of the row's segments."""
    dataset, segments = split.dataset, []
    for sample, start, length in zip(*split.slices_of(pack), strict=True):
        here = slice(start, start + length)
        ids, mask = dataset.tokens[sample][here].tolist(), dataset.mask[sample][here].tolist()
        segments.append(
            [(token, counts, int(dataset.task_ids[sample])) for token, counts in zip(ids, mask, strict=True)]
        )
    if dataset.joined and segments:
        segments = [[token for segment in segments for token in segment]]
    row = []
    for segment in segments:
        for p, (token, _, task) in enumerate(segment):
            label, counts, _ = segment[p + 1] if p + 1 < len(segment) else (0, 0, 0)
            row.append((token, label, counts, task, p))
    rest = split.seq_length - len(row)
    row += [(dataset.pad_token_id, 0, 0, 0, p) for p in range(rest)]
    return row, [*map(len, segments), *[rest] * (rest > 0)]


def assert_rows_are_right(split, packs):
    batch = batch_of_packs(split, np.array(packs))
    rows = [slow_row(split, pack) for pack in packs]
    expected = np.array([row for row, _ in rows])
    got = (batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS, batch.task_ids_BS, batch.position_ids_BS)
    for values, column in zip(got, np.moveaxis(expected, -1, 0), strict=True):
        np.testing.assert_array_equal(values, column)
    segments = [length for _, of_row in rows for length in of_row]
    np.testing.assert_array_equal(batch.cu_seqlens, np.cumsum([0, *segments]))
    np.testing.assert_array_equal(batch.sample_ids_BS.ravel(), np.repeat(np.arange(len(segments)), segments))
    assert batch.max_seqlen == max(segments)
    assert batch.num_segments == len(segments)
    assert batch.token_weights_BS is None
    assert batch.sample_weights_BS is None
    dtypes = {name: values.dtype.name for name, values in vars(batch).items() if isinstance(values, np.ndarray)}
    assert dtypes.pop("loss_mask_BS") == "uint8"
    assert dtypes.pop("cu_seqlens") == "int32"
    assert set(dtypes.values()) == {"int64"}


def test_every_row_of_every_split(dataset):
    assert dataset.splits == ("train", "valid", "test")
    for name in dataset.splits:
        split = dataset.split(name)
        for pack in range(split.num_packs):
            assert_rows_are_right(split, [pack])
        assert_rows_are_right(split, range(split.num_packs))


@pytest.mark.parametrize("way", ["split", "truncate-left", "padding", "concat"])
def test_every_row_of_windows_and_of_other_modes(make_dataset, way):
    options = {"padding_mode": way} if way in ("padding", "concat") else {"overlong": way}
    texts = {name: [{"text": f"{name} = {n}\n" * n} for n in range(1, 30)] for name in "ab"}
    prefix, _ = make_dataset(texts, seq_length=64 if way != "padding" else 256, split=(1, 0, 0), **options)
    split = PackedDataset.open(prefix, 64 if way != "padding" else 256).split("train")
    for pack in range(split.num_packs):
        assert_rows_are_right(split, [pack])
    assert_rows_are_right(split, [0, -1, *range(split.num_packs)])
    slices = split.slices(slice(0, split.num_slices))
    assert (slices.starts > 0).any() == (way != "padding")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(st.data())
def test_rows_of_any_choice_of_packs(dataset, data):
    split = dataset.split("train")
    pack = st.integers(-1, split.num_packs - 1)
    assert_rows_are_right(split, data.draw(st.lists(pack, min_size=1, max_size=5)))


def test_an_empty_pack_is_all_padding(dataset):
    batch = batch_of_packs(dataset.split("train"), [-1, -1])
    assert (batch.tokens_BS == dataset.pad_token_id).all()
    assert not batch.loss_mask_BS.any()
    assert batch.cu_seqlens.tolist() == [0, 256, 512]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(st.data())
def test_counts_equal_a_recount_of_the_rows(dataset, data):
    split = dataset.split("train")
    packs = np.array(data.draw(st.lists(st.integers(-1, split.num_packs - 1), min_size=1, max_size=6)))
    batch = batch_of_packs(split, packs)
    supervised = batch.loss_mask_BS.astype(bool)
    task, sample = batch.task_ids_BS[supervised], batch.sample_ids_BS[supervised]
    tokens_K, samples_K, token_weights_K, sample_weights_K = split.counts(packs)
    assert tokens_K.dtype == samples_K.dtype == np.int64
    np.testing.assert_array_equal(tokens_K, np.bincount(task, minlength=split.num_tasks))
    np.testing.assert_array_equal(token_weights_K, tokens_K)
    np.testing.assert_array_equal(sample_weights_K, samples_K)
    pairs = np.unique(np.stack([task, sample]), axis=1)
    np.testing.assert_array_equal(samples_K, np.bincount(pairs[0], minlength=split.num_tasks))
    assert split.num_tokens(packs) == sum(len(slow_row(split, p)[0]) - _padding(split, p) for p in packs)


def _padding(split, pack):
    used = sum(len(split.dataset.tokens[sample]) for sample in split.slices_of(pack).samples)
    return split.seq_length - used


def test_every_kept_sample_lies_in_exactly_one_pack_of_one_split(dataset):
    splits = [dataset.split(name) for name in dataset.splits]
    samples = np.concatenate([split.slices_of(pack).samples for split in splits for pack in range(split.num_packs)])
    assert sorted(samples) == np.flatnonzero(dataset.tokens.lengths <= 256).tolist()
    for split in splits:
        entry = dataset.entry.packs[split.name]
        assert int(split.totals.tokens_K.sum()) == entry.supervised_tokens
        for total, counted in zip(split.totals, split.counts(np.arange(split.num_packs)), strict=True):
            np.testing.assert_array_equal(total, counted)
        assert split.num_tokens(np.arange(split.num_packs)) == entry.tokens
        assert entry.fill == pytest.approx(entry.tokens / (split.num_packs * 256))


def test_packs_mix_tasks(dataset):
    split = dataset.split("train")
    mixed = [len(set(dataset.task_ids[split.slices_of(pack).samples])) > 1 for pack in range(split.num_packs)]
    assert any(mixed)


def test_tokens_are_read_in_place(dataset):
    assert isinstance(dataset.tokens.items, np.memmap)
    assert dataset.tokens.items.dtype == np.uint16
    assert isinstance(dataset.task_ids, np.memmap)


def test_padding_is_by_position_and_never_by_id(make_dataset, tokenizer_folder):
    """Samples that contain the pad id, as text, keep it as a token like any other."""
    prefix, _ = make_dataset({"t": [{"prompt": "say<|pad|>a<|pad|>", "completion": "b"}] * 3}, split=(1, 0, 0))
    opened = PackedDataset.open(prefix, 256)
    batch = batch_of_packs(opened.split("train"), [0])
    assert (batch.labels_BS == opened.pad_token_id).sum() == 6
    assert opened.splits == ("train",)


def test_a_split_that_is_not_there_is_refused(make_dataset):
    prefix, _ = make_dataset({"t": [{"text": "abc"}]}, split=(98, 2, 0))
    with pytest.raises(InputError, match="no valid split, only train"):
        PackedDataset.open(prefix, 256).split("valid")


@pytest.fixture
def copied(dataset, tmp_path):
    """The prefix of a copy that a test may damage."""
    for path in Path(dataset.prefix).parent.glob("set_*"):
        shutil.copy(path, tmp_path)
    return str(tmp_path / "set")


def test_a_copy_has_the_same_hash(copied, dataset):
    assert PackedDataset.open(copied, 256, check="hashes").dataset_hash == dataset.dataset_hash


def test_a_length_it_is_not_packed_for_is_refused(copied):
    assert packed_lengths(copied) == [256]
    assert training_packs(copied, 256) == PackedDataset.open(copied, 256).split("train").num_packs
    with pytest.raises(InputError, match=r"--seq-length 128: .* is packed for 256; use that, or pack it for 128"):
        training_packs(copied, 128)
    with pytest.raises(InputError, match=r"--seq-length 512: .*set is packed for 256; .*--seq-length 512"):
        PackedDataset.open(copied, 512)


PACK_FILES = [
    f"_{split}_{kind}.npy"
    for split in ("train", "valid", "test")
    for kind in ("packs_256", "packs_256_offsets", "counts_256")
]
FILES = ["_input_ids.bin", "_input_ids.idx", "_loss_mask.bin", "_loss_mask.idx", "_task_ids.npy", *PACK_FILES]


@pytest.mark.parametrize("end", FILES)
def test_a_missing_or_resized_file_is_refused_by_name(copied, end):
    path = Path(copied + end)
    content = path.read_bytes()
    for changed in (content[:-1], content + b"\0", b""):
        path.write_bytes(changed)
        with pytest.raises(InputError, match=rf"set{end}: {len(changed)} bytes, the ledger says {len(content)}"):
            PackedDataset.open(copied, 256)
    path.unlink()
    with pytest.raises(InputError, match=rf"set{end}: missing"):
        PackedDataset.open(copied, 256)


@pytest.mark.parametrize("end", FILES)
def test_a_changed_byte_is_found_by_the_hashes(copied, end):
    path = Path(copied + end)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"set{end}: its content differs"):
        PackedDataset.open(copied, 256, check="hashes")


def test_files_of_another_data_set_are_refused(copied, make_dataset):
    other, _ = make_dataset({"t": [{"text": "abc"}, {"text": "def"}]}, split=(1, 0, 0))
    shutil.copy(f"{other}_input_ids.bin", f"{copied}_input_ids.bin")
    with pytest.raises(InputError, match="not the file the ledger was written for"):
        PackedDataset.open(copied, 256)


def test_a_ledger_alone_is_refused(copied):
    for end in FILES:
        Path(copied + end).unlink()
    assert json.loads(Path(f"{copied}_dataset.json").read_text())["tasks"]
    with pytest.raises(InputError, match="missing"):
        PackedDataset.open(copied, 256)
