"""The order that mixes: a task is in as many steps as it can be, and its tokens vary little from step to step."""

import json
import types
from pathlib import Path

import numpy as np
import pytest

from mft_megatron.data._sample_index import best_fit_mixed, count_packs, rarest_tasks
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.epoch_order import epoch_order
from mft_megatron.data.loading.step_plan import plan_step
from mft_megatron.data.permutation import named_permutation
from tests.data.packing import mixing


class Split:
    """The part of a split that an order needs."""

    def __init__(self, dataset_hash, rarest_tasks):
        self.dataset, self.name = types.SimpleNamespace(dataset_hash=dataset_hash), "train"
        self.num_packs, self.rarest_tasks = len(rarest_tasks), rarest_tasks


@pytest.mark.parametrize(
    ("make", "samples"), [(mixing.five_tasks, 42_000), (mixing.zipf_tasks, 150_000), (mixing.short_tasks, 120_000)]
)
def test_presence_and_variation(make, samples):
    """At 128 packs a step; the best possible presence is 1, or the packs that hold the task over the steps."""
    lengths, tasks = make(samples)
    packs = best_fit_mixed(lengths, tasks, 4096, 7)
    counts = count_packs(*packs, tasks.astype(np.uint16), lengths.astype(np.int64))
    split = Split("hash", rarest_tasks(*counts[:3], len(packs[1]) - 1))
    best_K = np.minimum(1, 128 * np.bincount(counts[1]) / split.num_packs)
    variation, presence = [], []
    for epoch in range(3):
        order = epoch_order(split, 1, epoch, 2)
        assert np.bincount(order, minlength=split.num_packs).tolist() == [1] * split.num_packs
        tokens_SK = mixing.tokens_of_steps(lengths, tasks, packs, order, 128)
        variation.append(mixing.variation(tokens_SK, lengths, tasks))
        presence.append((tokens_SK > 0).mean(0) / best_K)
    assert np.mean(variation, axis=0).max() <= 1.15
    assert np.mean(presence, axis=0).min() >= 0.95


def test_a_rare_task_is_in_more_steps_than_in_a_random_order():
    """40 of 2000 packs hold the rare task, in 50 steps: by chance 55 % of them would."""
    tasks = np.ones(2000, np.int32)
    tasks[::50] = 0
    split = Split("hash", tasks)
    present = {}
    for version in (1, 2):
        orders = [epoch_order(split, seed, 0, version) for seed in range(40)]
        present[version] = np.mean([(tasks[order].reshape(50, 40) == 0).any(1).mean() for order in orders])
    assert 0.5 < present[1] < 0.6
    assert present[2] > 0.68
    # the distances from one pack of the task to the next are not all the same
    places = np.flatnonzero(tasks[epoch_order(split, 0, 0, 2)] == 0)
    assert np.diff(places).std() > 10


@pytest.mark.parametrize("mode", [{}, {"padding_mode": "padding"}, {"padding_mode": "concat"}])
def test_every_kind_of_data_set_has_the_order_that_mixes(make_dataset, mode):
    texts = {name: [{"text": f"{name} = {n}\n" * 3} for n in range(rows)] for name, rows in (("a", 200), ("b", 8))}
    prefix, ledger = make_dataset(texts, split=(1, 0, 0), **mode)
    assert ledger.lengths["256"].order_version == 2
    split = PackedDataset.open(prefix, 256).split("train")
    held = np.array([split.counts(np.array([pack])).tokens_K > 0 for pack in range(split.num_packs)])
    expected = [min(np.flatnonzero(row), key=lambda task: (held[:, task].sum(), task)) for row in held]
    assert split.rarest_tasks.tolist() == expected
    orders = {tuple(epoch_order(split, 1, epoch, 2).tolist()) for epoch in range(3)}
    assert all(sorted(order) == list(range(split.num_packs)) for order in orders)
    assert len(orders) == (3 if split.num_packs > 3 else len(orders))


# what the program gave that had no other order
ORDERS = [[2, 8, 6, 1, 0, 4, 3, 5, 7], [6, 0, 5, 2, 1, 7, 3, 4, 8], [4, 5, 3, 1, 0, 6, 2, 7, 8]]


def test_data_sets_of_older_versions_keep_their_order(make_dataset):
    old = Split("f" * 64, np.zeros(9, np.int32))
    assert [epoch_order(old, seed, epoch, 1).tolist() for seed, epoch in ((1, 0), (1, 7), (1234, 0))] == ORDERS
    prefix, new = make_dataset()
    path = Path(f"{prefix}_dataset.json")
    content = json.loads(path.read_text())
    del content["lengths"]["256"]["order_version"]
    path.write_text(json.dumps({**content, "format_version": 3}))
    split = PackedDataset.open(prefix, 256).split("train")
    assert split.dataset.entry.order_version == 1
    name = f"{new.dataset_hash(256)}/train/5/0"
    plan = plan_step(split, seed=5, global_batch_size=split.num_packs, consumed_samples=0)
    assert plan.packs_G.tolist() == named_permutation(name, split.num_packs).tolist()
    assert plan.packs_G.tolist() != epoch_order(split, 5, 0, 2).tolist()
