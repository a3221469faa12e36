"""Realised shares that are off their targets: which, when an epoch excuses it, and what the warning says."""

import dataclasses

import numpy as np
import pytest

from mft_megatron.training.shares.account import RunShares
from mft_megatron.training.shares.deviations import Circumstances, EpochPacks, off_target, share_warning

TASKS = ("write", "read", "fix")


def shares(realised, target=(0.25, 0.25, 0.5), packs=100, absent=(0, 0, 0), **changes):
    made = RunShares(
        steps=10,
        packs=packs,
        realised_K=np.array(realised) * packs,
        target_K=np.array(target) * packs,
        weighted_K=np.full(3, 10),
        absent_K=np.array(absent),
        normalizations=("global",),
    )
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize(
    ("realised", "off"),
    [
        ((0.25, 0.25, 0.5), []),
        ((0.2376, 0.2624, 0.5), []),  # within 5 %
        ((0.2374, 0.2630, 0.4996), [1, 0]),
        ((0.2, 0.28, 0.52), [0, 1]),  # the largest relative difference first; 4 % of the third
        ((0.0, 0.3, 0.7), [0, 2, 1]),
    ],
)
def test_tasks_that_are_off_their_targets(realised, off):
    assert off_target(shares(realised)) == off


def test_without_targets_or_steps_nothing_is_off():
    assert off_target(shares((0.1, 0.1, 0.8), target=(0, 0, 0))) == []
    assert off_target(shares((0, 0, 0), packs=0)) == []
    assert off_target(shares((0.5, 0.5, 0.0), target=(0.5, 0.5, 0.0))) == []  # a task without a weight


@pytest.mark.parametrize(
    ("began", "consumed", "expected"),
    [
        (0, 0, (0, 0, 0)),
        (0, 40, (0, 100, 40)),
        (0, 100, (100, 0, 0)),
        (0, 250, (200, 100, 50)),
        (30, 70, (0, 100, 70)),
        (30, 100, (0, 100, 0)),
        (30, 130, (0, 200, 30)),
        (30, 250, (100, 200, 50)),
        (100, 200, (100, 0, 0)),
    ],
)
def test_epochs_between_two_numbers_of_packs(began, consumed, expected):
    epochs = EpochPacks.between(began, consumed, 100)
    assert (epochs.complete, epochs.open, epochs.current) == expected


@pytest.mark.parametrize(
    ("realised", "consumed", "off"),
    [
        # an epoch of 100 packs gives the tasks 25, 25 and 50
        ((0, 0, 10), 10, []),  # all of it can still come
        ((25, 25, 0), 10, []),
        ((27, 25, 0), 10, [0]),  # more than an epoch has
        ((25, 25, 50), 100, []),
        ((23, 25, 52), 100, [0]),
        ((25, 25, 50), 140, []),  # nothing of the second epoch
        ((50, 50, 100), 140, []),  # all of it
        ((23, 25, 60), 140, [0]),  # less than the first epoch had
        ((25, 53, 60), 140, [1]),
    ],
)
def test_an_open_epoch_excuses_what_it_can_make_up_for(realised, consumed, off):
    made = shares((0, 0, 0), packs=consumed, realised_K=np.array(realised, float))
    assert off_target(made, EpochPacks.between(0, consumed, 100)) == off


GLOBAL = Circumstances("global", 8, EpochPacks.between(0, 40, 100))
EPOCH = dataclasses.replace(GLOBAL, normalization="epoch", over=True)
OVER_EPOCHS = ("epoch",)


def warning(circumstances=GLOBAL, **changes):
    made = shares((0.2, 0.28, 0.52), **changes)
    return share_warning(made, [0, 1], TASKS, circumstances)


def test_absent_tasks_are_the_reason_under_global():
    text = warning(absent=(3, 0, 0))
    assert text.startswith(
        "realised shares of the objective in 10 steps so far: write has 20.0% for 25.0% (absent from 3 of 10), "
        "read has 28.0% for 25.0%; under global normalisation the tasks that are in a step take over"
    )
    assert "a larger --global-batch-size (8 so far)" in text
    assert "--mft-normalization epoch" in text
    assert "--packer" not in text
    assert "--packer mixed" in warning(dataclasses.replace(GLOBAL, packed_decreasing=True), absent=(3, 0, 0))
    assert "in 10 steps since pack 30: " in warning(absent=(3, 0, 0), began=30)


@pytest.mark.parametrize(
    ("changes", "circumstances", "text"),
    [
        ({}, GLOBAL, "under global normalisation only rounding can do this; please report it"),
        ({"normalizations": ("epoch", "global")}, GLOBAL, "for 25.0%; part of the run had --mft-normalization epoch"),
        ({}, {"normalization": "micro-batch"}, "divides by the weights of the tasks that happen to be in one micro-"),
        ({}, {}, "a task has its share over a whole epoch; the run ends after 40 of 100 packs of an epoch (--num-tra"),
        ({"began": 30}, {"epochs": EpochPacks.between(30, 300, 100)}, "whole epoch; counting began within an epoch"),
        ({}, {"epochs": EpochPacks.between(0, 100, 100), "skipped_steps": 1}, "whole epoch; 1 step updated nothing"),
        ({}, {"skipped_steps": 2000}, "ends it with one), and 2,000 steps updated nothing"),
        ({"weights_changed": True}, {}, ", and weights of tasks changed within epochs"),
        ({"weights_changed": True}, {"over": False}, "over a whole epoch; weights of tasks changed within epochs"),
        ({"normalizations": ("global", "epoch")}, {}, ", and part of the run had --mft-normalization global"),
        ({}, {"epochs": EpochPacks.between(0, 100, 100)}, "whole epoch; only rounding can do this; please report it"),
    ],
)
def test_the_reason_of_a_difference(changes, circumstances, text):
    if isinstance(circumstances, dict):
        circumstances = dataclasses.replace(EPOCH, **circumstances)
        changes = {"normalizations": OVER_EPOCHS, **changes}
    assert text in warning(circumstances, **changes)


def test_many_tasks_are_not_all_listed():
    made = RunShares(5, 20, np.arange(20.0), np.ones(20), np.ones(20), np.zeros(20), ("global",))
    off = off_target(made)
    assert len(off) == 20
    text = share_warning(made, off, [f"task{number}" for number in range(20)], GLOBAL)
    assert text.count(" has ") == 8
    assert ", and 12 more tasks; under global" in text
