"""Presence, shares and spikes of the coming epoch against loops over its steps, and the lines that say them."""

import types

import numpy as np
import pytest

from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.data.loading.epoch_order import epoch_order
from mft_megatron.training.progress import Progress
from mft_megatron.training.shares import coming_epoch, share_log, start_lines
from mft_megatron.training.shares.coming_epoch import ComingEpoch, count_epoch
from mft_megatron.training.shares.share_log import ShareLog
from mft_megatron.training.shares.start_lines import clipping_warning, expectation_lines
from tests.made_dataset import write_dataset


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("epoch") / "set"
    write_dataset(prefix, 256)
    return PackedDataset.open(prefix, 256).split("train")


def in_loops(split, order, size, weights, by_samples):
    """The same numbers, step by step and task by task."""
    steps = [order[start : start + size].tolist() for start in range(0, len(order), size)]
    tasks = range(split.num_tasks)
    totals = split.totals.samples_K if by_samples else split.totals.tokens_K
    present, mass, largest, all_mass = [0.0] * 4, [0.0] * 4, [0.0] * 4, 0.0
    for packs in steps:
        sums = [0] * 4
        for pack in packs:
            counts = split.counts(np.array([pack]))
            for task in tasks:
                sums[task] += int((counts.samples_K if by_samples else counts.tokens_K)[task])
        weight = sum(weights[task] for task in tasks if sums[task])
        for task in tasks:
            if sums[task]:
                present[task] += len(packs) / len(order)
                if weight:
                    mass[task] += len(packs) * weights[task] / weight
            mean = totals[task] * min(size, len(order)) / len(order)
            largest[task] = max(largest[task], sums[task] / mean)
        all_mass += len(packs) if weight else 0
    return present, [value / all_mass for value in mass], largest


@pytest.mark.parametrize("size", [1, 3, 8, 10**6])
@pytest.mark.parametrize("by_samples", [False, True])
@pytest.mark.parametrize("weights", [[1.0, 2.0, 0.5, 3.0], [0.0, 0.0, 0.0, 1.0]])
def test_an_epoch_is_counted_step_by_step(split, size, by_samples, weights, monkeypatch):
    monkeypatch.setattr(coming_epoch, "PACKS_AT_ONCE", 10)  # blocks of whole steps
    order = epoch_order(split, 3, 1, 1)
    epoch = count_epoch(split, order, size, np.array(weights), by_samples)
    present, shares, largest = in_loops(split, order, size, weights, by_samples)
    np.testing.assert_allclose(epoch.presence_K, present, rtol=1e-12)
    np.testing.assert_allclose(epoch.global_share_K, shares, rtol=1e-12)
    np.testing.assert_allclose(epoch.largest_K, largest, rtol=1e-12)
    if size == 1:
        assert epoch.presence_K.max() < 1
    if size == 10**6:
        assert epoch.presence_K.tolist() == [1.0] * 4
        np.testing.assert_allclose(epoch.largest_K, 1.0)


def test_entries_of_packs_are_their_counts(split):
    packs = np.array([5, 0, 9, 5])
    entries, first = split.entries(packs), 0
    for pack, number in zip(packs, entries.numbers, strict=True):
        counts = split.counts(np.array([pack]))
        rows = slice(first, first + number)
        tokens_K, samples_K = np.zeros(4), np.zeros(4)
        tokens_K[entries.tasks_E[rows]] = entries.token_weights_E[rows]
        samples_K[entries.tasks_E[rows]] = entries.sample_weights_E[rows]
        assert tokens_K.tolist() == counts.token_weights_K.tolist()
        assert samples_K.tolist() == counts.sample_weights_K.tolist()
        first += number
    assert first == len(entries.tasks_E)


def made(presence, shares=None, largest=None):
    presence = np.array(presence, float)
    return ComingEpoch(presence, np.zeros(len(presence)) if shares is None else np.array(shares), presence * 0 + 3)


def test_a_line_for_each_task():
    epoch = made([1.0, 0.64, 0.5, 0.0], [0.6, 0.133, 0.0, 0.0])
    names, targets = ("write", "read", "fix", "none"), np.array([0.8, 0.2, 0.0, 0.0])
    assert expectation_lines(epoch, names, targets) == [
        "task write: target 80.0%, in every step; with global normalisation it realises 60.0%, with epoch 1 times its "
        "target there, 3 at most",
        "task read: target 20.0%, in 64.0% of the steps; with global normalisation it realises 13.3%, with epoch 1.56 "
        "times its target there, 3 at most",
        "task fix: weight 0, in 50.0% of the steps",
        "task none: nothing to train on",
    ]
    assert expectation_lines(epoch, names, None)[:2] == [
        "task write: in every step",
        "task read: in 64.0% of the steps",
    ]


def test_of_many_tasks_the_rarest_have_a_line():
    presence = np.linspace(1, 0.1, 30)
    lines = expectation_lines(made(presence), [f"task{number}" for number in range(30)], np.full(30, 1 / 30))
    assert len(lines) == 21
    assert lines[0].startswith("task task29: target 3.3%, in 10.0% of the steps;")
    assert lines[20] == f"10 more tasks: in at least {presence[9]:.1%} of the steps"
    lines = expectation_lines(made([1.0] * 21), [str(number) for number in range(21)], None)
    assert lines[20] == "1 more task: in every step"


@pytest.mark.parametrize(
    ("presence", "clip_grad", "rare"),
    [
        ([0.5, 0.09, 0.05, 0.0], 1.0, [1]),
        ([0.5, 0.1, 0.05, 0.0], 1.0, []),
        ([0.5, 0.09, 0.5, 0.0], 0.0, []),
    ],
)
def test_rare_tasks_and_clipping(presence, clip_grad, rare):
    warning = clipping_warning(made(presence), np.array([1.0, 1.0, 0.0, 1.0]), clip_grad)
    assert (warning[1] if warning else []) == rare
    if warning:
        assert "less than 10% of the steps" in warning[0]
        assert "--clip-grad 1 may scale these steps down" in warning[0]
        assert "a larger --global-batch-size" in warning[0]


class Log(list):
    write = print = list.append


def arguments(loss="task-token", normalization="global"):
    return types.SimpleNamespace(
        multi_task=types.SimpleNamespace(mft_loss=loss, mft_normalization=normalization),
        initialization=types.SimpleNamespace(seed=3),
        batch_sizes=types.SimpleNamespace(sizes=[4, 3]),
        regularization=types.SimpleNamespace(clip_grad=1.0),
    )


@pytest.mark.parametrize(
    ("loss", "normalization", "warns"),
    [("task-token", "epoch", True), ("task-token", "global", False), ("token", "epoch", False)],
)
def test_the_log_of_a_run_begins_with_them(split, monkeypatch, loss, normalization, warns):
    """After an epoch and a half the second epoch is the coming one, in steps of the last batch size."""
    monkeypatch.setattr(share_log.process_groups, "is_main", lambda: True)
    log, weights = Log(), np.array([1.0, 1.0, 1.0, 1.0])
    progress = Progress(1, split.num_packs * 3 // 2)
    epoch = count_epoch(split, epoch_order(split, 3, 1, 1), 3, weights, False)
    monkeypatch.setattr(start_lines, "RARE", 1.01 * min(epoch.presence_K))
    ShareLog(arguments(loss, normalization), split.dataset).expect(log, progress, weights, 1)
    targets = np.full(4, 0.25) if loss == "task-token" else None
    assert log[:4] == expectation_lines(epoch, split.dataset.tasks, targets)
    rarest = split.dataset.tasks[int(np.argmin(epoch.presence_K))]
    assert [record["tasks"] for record in log[4:]] == ([[rarest]] if warns else [])
    others = Log()
    monkeypatch.setattr(share_log.process_groups, "is_main", lambda: False)
    ShareLog(arguments(loss, normalization), split.dataset).expect(others, progress, weights, 1)
    assert others == []


def test_no_task_with_a_weight_has_training_data(split, monkeypatch):
    """Sampling can leave a task out."""
    monkeypatch.setattr(share_log.process_groups, "is_main", lambda: True)
    monkeypatch.setattr(share_log, "count_epoch", lambda *_: made([1.0, 0.5, 1.0, 0.0]))
    log = Log()
    ShareLog(arguments(), split.dataset).expect(log, Progress(), np.array([0.0, 0.0, 0.0, 1.0]), 1)
    assert [line.split(": ")[1] for line in log] == [
        "weight 0, in every step",
        "weight 0, in 50.0% of the steps",
        "weight 0, in every step",
        "nothing to train on",
    ]
