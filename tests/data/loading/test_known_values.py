"""Data sets whose files and ledger were rewritten together: values that the model does not know are named."""

import dataclasses
import gc
import os
import re

import numpy as np
import pytest

from mft_megatron.data.inspect import check
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.micro_batches import MicroBatches
from mft_megatron.data.storage.checked_values import first_outside
from mft_megatron.data.storage.ledger import ArrayEntry, file_sha256, ledger_path, read_ledger
from tests.made_dataset import TASKS, VOCABULARY, batch_of_packs, write_dataset
from tests.refusals import refused_call

SAMPLE, TOKEN = 50, 3
BEYOND = f"is {{}}, the vocabulary has {VOCABULARY}; the data set was changed after it was made"


@pytest.fixture
def prefix(tmp_path):
    write_dataset(tmp_path / "set", 128, longest=120, split=(80, 20, 0), weighted="samples turns")
    return tmp_path / "set"


def rewrite(prefix, suffix, change):
    """Change a file in place, and write its new hash into the ledger."""
    file = prefix.with_name(prefix.name + suffix)
    change(file)
    ledger = read_ledger(prefix)
    entry = ArrayEntry(file.stat().st_size, file_sha256(file))
    changed = dataclasses.replace(ledger, arrays={**ledger.arrays, suffix: entry})
    ledger_path(prefix).write_text(changed.to_json())


def set_item(index, value, dtype, offset=0):
    def change(file):
        np.memmap(file, dtype, "r+", offset)[index] = value

    return change


def pack_of(dataset, sample):
    """The split and the pack that hold a whole sample."""
    for name in dataset.splits:
        split = dataset.split(name)
        for pack in range(split.num_packs):
            if sample in split.slices_of(pack).samples:
                return split, pack
    raise AssertionError


def item_of(prefix, sample, token):
    return int(PackedDataset.open(prefix, 128).tokens.start_of(sample)) + token


@pytest.mark.parametrize("value", [VOCABULARY, 65535])
def test_an_id_beyond_the_vocabulary_is_named(prefix, value):
    """When a batch is built, when the data set is opened with hashes, and by --check."""
    rewrite(prefix, "_input_ids.bin", set_item(item_of(prefix, SAMPLE, TOKEN), value, np.uint16))
    dataset = PackedDataset.open(prefix, 128)
    split, pack = pack_of(dataset, SAMPLE)
    task = list(TASKS)[dataset.task_ids[SAMPLE]]
    said = refused_call(batch_of_packs, split, [(pack + 1) % split.num_packs, pack])
    sample = f"{prefix}_input_ids.bin: token {TOKEN} of sample {SAMPLE} (task {task}"
    assert said.startswith(f"{sample}, pack {pack} of {split.name}) {BEYOND.format(value)}")
    for opening in (lambda: PackedDataset.open(prefix, 128, "hashes"), lambda: check(prefix, read_ledger(prefix))):
        assert refused_call(opening).startswith(f"{sample}) {BEYOND.format(value)}")


def test_only_ranks_whose_rows_have_it_see_it(prefix):
    rewrite(prefix, "_input_ids.bin", set_item(item_of(prefix, SAMPLE, TOKEN), VOCABULARY, np.uint16))
    split, pack = pack_of(PackedDataset.open(prefix, 128), SAMPLE)
    assert batch_of_packs(split, [(pack + 1) % split.num_packs]).tokens_BS.max() < VOCABULARY
    with pytest.raises(Exception, match="sample") as caught:
        batch_of_packs(split, [pack])
    assert caught.value.always


def test_the_largest_id_and_the_padding_are_known(prefix):
    rewrite(prefix, "_input_ids.bin", set_item(item_of(prefix, SAMPLE, TOKEN), VOCABULARY - 1, np.uint16))
    split, pack = pack_of(PackedDataset.open(prefix, 128, "hashes"), SAMPLE)
    assert batch_of_packs(split, [pack, -1]).tokens_BS.max() == VOCABULARY - 1


@pytest.mark.parametrize(
    ("suffix", "change", "said"),
    [
        ("_loss_mask.bin", set_item(7, 2, np.uint8), r"_loss_mask.bin: mask of token 7 of sample 0 \(task completion"),
        ("_task_ids.npy", set_item(-1, 4, np.uint16, 128), r"_task_ids.npy: sample \d+ is of task number 4, and the"),
        ("_sample_weights.npy", set_item(1, np.nan, np.float32, 128), r"_sample_weights.npy: weight 1 is nan; the"),
        ("_token_weights.bin", set_item(5, -1, np.float32), r"_token_weights.bin: weight 5 is -1; the data set was"),
    ],
)
def test_other_values_are_named_when_the_data_set_is_opened(prefix, suffix, change, said):
    PackedDataset.open(prefix, 128, "hashes")
    rewrite(prefix, suffix, change)
    assert re.search(said, refused_call(PackedDataset.open, prefix, 128, "hashes"))


def test_a_mask_that_is_none_is_named_in_a_batch(prefix):
    rewrite(prefix, "_loss_mask.bin", set_item(item_of(prefix, SAMPLE, TOKEN), 255, np.uint8))
    split, pack = pack_of(PackedDataset.open(prefix, 128), SAMPLE)
    said = refused_call(batch_of_packs, split, [pack])
    assert f"_loss_mask.bin: mask of token {TOKEN} of sample {SAMPLE} (task" in said
    assert f", pack {pack} of {split.name}) is 255, a mask is 0 or 1" in said


def test_the_first_value_outside_is_found_wherever_it_is():
    for dtype in (np.uint16, np.int32):
        values = np.zeros(3_000_000, dtype)
        assert first_outside(values, 2) is None
        for index in (2_999_999, 1 << 20, (1 << 20) - 1, 0):
            values[index] = 2
            assert first_outside(values, 2) == index
    values[17] = -1
    assert first_outside(values[1:], 3) == 16
    assert first_outside(np.full(2, 65535, np.uint16), 1 << 17) is None
    assert first_outside(values[:0], 1) is None


def test_a_file_that_is_cut_off_under_a_run_is_named(prefix):
    split = PackedDataset.open(prefix, 128).split("train")
    rows = [[split.slices_of(pack)] for pack in range(2)]
    batches = iter(MicroBatches(split.dataset, rows, np.zeros((2, 1), np.int64), 16))
    next(batches)
    os.truncate(f"{prefix}_input_ids.bin", 0)
    said = refused_call(next, batches)
    del split, rows, batches
    gc.collect()  # the file is reported as long as it is mapped
    assert said.startswith(f"{prefix}_input_ids.bin: was cut off or replaced while it was read, and has 0 bytes now")
