"""The packer that mixes: rows as full as of best-fit decreasing, tasks spread over the steps as by random dealing."""

import numpy as np
import pytest

from mft_megatron.data._sample_index import best_fit_decreasing, best_fit_mixed, epoch_order
from mft_megatron.data.packing.build_packs import build_packs
from mft_megatron.data.packing.packing_options import PackingOptions
from tests.data.packing import mixing
from tests.data.stores import stored_of


def spread(lengths, tasks, packs, global_batch_size):
    """Variation against random dealing and presence against that of random dealing, [tasks], means of four orders."""
    found = []
    for seed in range(4):
        order = epoch_order(len(packs[1]) - 1, seed)
        tokens_SK = mixing.tokens_of_steps(lengths, tasks, packs, order, global_batch_size)
        presence_K = (tokens_SK > 0).mean(0) / mixing.presence_of_random_dealing(tasks, len(tokens_SK))
        found.append((mixing.variation(tokens_SK, lengths, tasks), presence_K))
    return np.mean(found, axis=0)


@pytest.mark.parametrize(
    ("make", "samples", "rows", "largest", "worst_of_decreasing"),
    [
        (mixing.five_tasks, 21_000, 0.007, 1.0, 4),
        (mixing.zipf_tasks, 60_000, 0.007, 1.25, 2.5),
        (mixing.short_tasks, 60_000, 0.007, 1.35, 8),
        (mixing.long_samples, 20_000, 0.001, 1.0, None),
    ],
)
def test_rows_and_spread(make, samples, rows, largest, worst_of_decreasing):
    lengths, tasks = make(samples)
    decreasing = best_fit_decreasing(lengths, 4096)
    mixed = best_fit_mixed(lengths, tasks, 4096, 7)
    fewest = len(decreasing[1]) - 1
    assert len(mixed[1]) - 1 <= fewest + max(1, rows * fewest if fewest <= 5000 else 0.001 * fewest)
    variation_K, presence_K = spread(lengths, tasks, mixed, 32)
    assert variation_K.max() <= largest
    assert np.median(variation_K) <= 1
    assert presence_K.min() >= 0.95
    if worst_of_decreasing is not None:  # the measure tells packs that do not mix
        assert spread(lengths, tasks, decreasing, 32)[0].max() > worst_of_decreasing


def rows_of(packed):
    return [tuple(samples.tolist()) for samples in np.split(packed.slices.samples, packed.offsets[1:-1])]


SHORT, LONG = [[0, 1]] * 120, [[0, 1, 1, 1, 1]] * 240


def packed(**options):
    tasks = {"short": SHORT, "long": LONG}
    return build_packs(stored_of(tasks), PackingOptions(**{"seq_length": 25, "split": (2, 1, 1), **options}))[0]


def test_training_packs_are_mixed_and_others_are_not():
    mixed, decreasing = packed(), packed(packer="decreasing")
    for split in ("valid", "test"):
        assert rows_of(mixed[split]) == rows_of(decreasing[split])
    short = [sum(sample < 120 for sample in row) for row in rows_of(mixed["train"])]
    crowded = [sum(sample < 120 for sample in row) for row in rows_of(decreasing["train"])]
    assert np.mean(np.array(short) > 0) > 2 * np.mean(np.array(crowded) > 0)


def test_the_packer_depends_on_the_seed_and_the_length_and_nothing_else():
    assert rows_of(packed()["train"]) == rows_of(packed()["train"])
    assert rows_of(packed(seed=1)["train"]) != rows_of(packed(seed=2)["train"])
    # of another split of the data the permutation is another one, too; of the same one it is that of the name
    names = {(seed, length) for seed in (1, 2) for length in (25, 30)}
    rows = {name: tuple(rows_of(packed(seed=name[0], seq_length=name[1], split=(1, 0, 0))["train"])) for name in names}
    assert len(set(rows.values())) == len(names)


def test_copies_and_tasks_are_groups_of_their_own():
    """The rows of one pass are those of a pass without repetition; another copy has other rows."""
    once = rows_of(packed(split=(1, 0, 0))["train"])
    twice = rows_of(packed(split=(1, 0, 0), task_sampling={"short": 2.0, "long": 2.0})["train"])
    assert twice[: len(once)] == once
    assert len(twice) == 2 * len(once)
    assert twice[len(once) :] != once
    for row in rows_of(packed(packing="per-task", split=(1, 0, 0))["train"]):
        assert len({sample < 120 for sample in row}) == 1


def test_padded_and_joined_rows_do_not_depend_on_the_packer():
    documents = {"a": [[1] * 5] * 30, "b": [[1] * 3] * 30}
    for mode in ("padding", "concat"):
        one, other = (
            build_packs(stored_of(documents), PackingOptions(8, padding_mode=mode, packer=packer))[0]
            for packer in ("mixed", "decreasing")
        )
        assert rows_of(one["train"]) == rows_of(other["train"])


GOLDEN = {
    "mixed": [(4, 0, 10, 7), (8, 2, 11, 6, 9), (5, 1, 3), (8, 10, 9, 11)],
    "decreasing": [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (8, 9, 10, 11)],
}


@pytest.mark.parametrize("packer", GOLDEN)
def test_the_packs_are_fixed_for_ever(packer):
    """Golden: data that are packed again with a newer version must be the data of the checkpoint."""
    options = PackingOptions(12, split=(1, 0, 0), packer=packer, task_sampling={"b": 2.0})
    packs, _, _ = build_packs(stored_of({"a": [[0, 1, 1]] * 8, "b": [[0, 1]] * 4}), options)
    assert rows_of(packs["train"]) == GOLDEN[packer]
