"""Weights of samples and turns: stored, summed for each pack, and in each batch, against plain Python."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mft_megatron.data.inspect import check
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.step_plan import plan_step
from mft_megatron.data.packing.packing_options import PackingOptions
from mft_megatron.data.preprocessing.repack import add_length, merge
from mft_megatron.data.storage.ledger import read_ledger
from mft_megatron.data.storage.weights import load_sample_weights, load_token_weights
from mft_megatron.errors import InputError
from tests.made_dataset import batch_of_packs, write_dataset

WEIGHTED = ["samples", "turns", "samples and turns"]
OPTIONS = [
    {},
    {"overlong": "split", "longest": 300},
    {"overlong": "truncate", "longest": 300, "packing": "per-task"},
    {"padding_mode": "padding"},
    {"task_sampling": {"explain": 2.5, "read": 0.5}, "sampling_epochs": 2},
]


def sums_of_batch(split, packs):
    """Sums of weights that rows themselves give: by token and by segment, in plain Python."""
    batch = batch_of_packs(split, packs)
    tokens, samples = [[] for _ in range(split.num_tasks)], [[] for _ in range(split.num_tasks)]
    seen = set()
    for row, position in zip(*np.nonzero(batch.loss_mask_BS), strict=True):
        u = 1.0 if batch.token_weights_BS is None else float(batch.token_weights_BS[row, position])
        v = 1.0 if batch.sample_weights_BS is None else float(batch.sample_weights_BS[row, position])
        task, segment = int(batch.task_ids_BS[row, position]), int(batch.sample_ids_BS[row, position])
        tokens[task].append(v * u)
        if segment not in seen:
            seen.add(segment)
            samples[task].append(v)
    return list(map(math.fsum, tokens)), list(map(math.fsum, samples))


@pytest.mark.parametrize("weighted", WEIGHTED)
@pytest.mark.parametrize("options", OPTIONS)
def test_counts_are_the_sums_of_the_weights_in_the_rows(tmp_path, weighted, options):
    write_dataset(tmp_path / "set", 96, split=(90.0, 10.0, 0.0), weighted=weighted, **options)
    dataset = PackedDataset.open(tmp_path / "set", 96)
    for name in dataset.splits:
        split = dataset.split(name)
        packs = np.arange(split.num_packs)
        for chosen in (packs, packs[::-3], np.array([0, -1, 0])):
            counts = split.counts(chosen)
            tokens, samples = sums_of_batch(split, chosen)
            assert counts.token_weights_K == pytest.approx(tokens, rel=1e-14)
            assert counts.sample_weights_K == pytest.approx(samples, rel=1e-14)
        assert all(np.array_equal(one, other) for one, other in zip(split.totals, split.counts(packs), strict=True))
        assert not np.array_equal(split.totals.token_weights_K, split.totals.tokens_K)
        batch = batch_of_packs(split, packs[:4])
        assert (batch.token_weights_BS is None) == ("turns" not in weighted)
        assert (batch.sample_weights_BS is None) == ("samples" not in weighted)
        if batch.token_weights_BS is not None:
            assert batch.token_weights_BS.dtype == np.float32
            assert np.array_equal(batch.token_weights_BS > 0, batch.loss_mask_BS == 1)
        if batch.sample_weights_BS is not None:
            padding = np.arange(batch.tokens_BS.shape[1]) >= batch.lengths_B[:, None]
            assert np.array_equal(batch.sample_weights_BS == 0, padding)
    check(str(tmp_path / "set"), dataset.ledger)
    plan = plan_step(dataset.split("train"), seed=1, global_batch_size=4, consumed_samples=2)
    expected = sums_of_batch(dataset.split("train"), plan.packs_G)
    assert plan.counts.token_weights_K == pytest.approx(expected[0], rel=1e-14)


def files_of(prefix):
    """Content of every file of a data set but its ledger, by suffix."""
    paths = sorted(Path(prefix).parent.glob(f"{Path(prefix).name}_*"))
    return {path.name: path.read_bytes() for path in paths if not path.name.endswith("_dataset.json")}


def test_weights_add_files_and_change_no_other(tmp_path):
    for name, weighted in (("plain", ""), ("heavy", "samples and turns")):
        (tmp_path / name).mkdir()
        write_dataset(tmp_path / name / "set", 96, overlong="split", longest=300, weighted=weighted)
    plain, heavy = (files_of(tmp_path / name / "set") for name in ("plain", "heavy"))
    added = set(heavy) - set(plain)
    splits = read_ledger(tmp_path / "plain/set").lengths["96"].packs
    assert added == {
        "set_sample_weights.npy",
        "set_token_weights.bin",
        "set_token_weights.idx",
        *(f"set_{split}_weights_96.npy" for split in splits),
    }
    assert all(heavy[name] == content for name, content in plain.items())
    assert read_ledger(tmp_path / "plain/set").tasks[0].weights == {}
    counts = PackedDataset.open(tmp_path / "plain/set", 96).split("train").totals
    assert np.array_equal(counts.token_weights_K, counts.tokens_K)
    assert np.array_equal(counts.sample_weights_K, counts.samples_K)


def test_the_ledger_counts_weights_by_task(tmp_path):
    ledger = write_dataset(tmp_path / "set", 96, weighted="samples and turns")
    dataset = PackedDataset.open(tmp_path / "set", 96)
    for index, task in enumerate(ledger.tasks):
        of_samples, of_tokens, products = [], [], []
        for sample in np.flatnonzero(dataset.task_ids == index):
            of_samples.append(float(dataset.sample_weights[sample]))
            weights = dataset.token_weights[sample].tolist()
            of_tokens += [weight for weight in weights if weight]
            products += [of_samples[-1] * weight for weight in weights[1:]]
        for what, values, total in (("samples", of_samples, of_samples), ("tokens", of_tokens, products)):
            counted = task.weights[what]
            assert counted["others"] == sum(value != 1 for value in values)
            assert (counted["min"], counted["max"]) == (min(values), max(values))
            assert counted["sum"] == pytest.approx(math.fsum(total), rel=1e-12)


@pytest.mark.parametrize("order", [("plain", "heavy"), ("heavy", "plain"), ("turns", "plain", "heavy")])
def test_merging_and_packing_again_keep_weights(tmp_path, order):
    kinds = {"plain": "", "heavy": "samples", "turns": "turns"}
    for name in order:
        write_dataset(tmp_path / name, 96, weighted=kinds[name], tasks={"both": 3, name: 5})
    merged, _ = merge([str(tmp_path / name) for name in order], tmp_path / "merged", PackingOptions(96))
    ledgers = {name: read_ledger(tmp_path / name) for name in order}
    samples, tokens = [], []
    for task in merged.tasks:
        for name, ledger in ledgers.items():
            names = [of_set.name for of_set in ledger.tasks]
            if task.name in names:
                first = sum(before.kept for before in ledger.tasks[: names.index(task.name)])
                dataset = PackedDataset.open(tmp_path / name, 96)
                for sample in range(first, first + ledger.tasks[names.index(task.name)].kept):
                    weights = dataset.token_weights or dataset.mask
                    tokens.append(weights[sample].astype(np.float32))
                    samples.append(1.0 if dataset.sample_weights is None else dataset.sample_weights[sample])
    assert np.array_equal(load_sample_weights(tmp_path / "merged", merged.arrays), np.array(samples, np.float32))
    stored = load_token_weights(tmp_path / "merged", merged.arrays)
    assert (stored is None) == ("turns" not in order)
    if stored is not None:
        assert np.array_equal(stored.items, np.concatenate(tokens))
    check(str(tmp_path / "merged"), merged)

    longer, _ = add_length(str(tmp_path / "merged"), PackingOptions(128))
    assert "_train_weights_128.npy" in longer.arrays
    assert "_train_weights_128.npy" not in longer.arrays_for(96)
    check(str(tmp_path / "merged"), longer)
    # the same length again replaces its files
    again, _ = add_length(str(tmp_path / "merged"), PackingOptions(128, split=(50.0, 50.0, 0.0)))
    assert again.arrays["_train_weights_128.npy"] != longer.arrays["_train_weights_128.npy"]
    assert again.dataset_hash(96) == longer.dataset_hash(96) == merged.dataset_hash(96)


def test_documents_with_weights_cannot_be_concatenated(tmp_path):
    with pytest.raises(InputError, match="--padding-mode concat: documents of task completion have weights"):
        write_dataset(tmp_path / "set", 96, documents=True, padding_mode="concat", weighted="samples")


def test_the_check_finds_wrong_weights(tmp_path):
    write_dataset(tmp_path / "set", 96, weighted="samples")
    ledger_path = tmp_path / "set_dataset.json"
    content = json.loads(ledger_path.read_text())
    content["tasks"][0]["weights"]["samples"]["sum"] += 1
    ledger_path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="task completion: weights: does not agree"):
        check(str(tmp_path / "set"), read_ledger(tmp_path / "set"))
