"""Cutting samples that are longer than a pack, compared with cutting one mask at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mft_megatron.data.packing import cutting
from mft_megatron.data.packing.cutting import CUT_TO_NOTHING, KEPT, TOO_LONG, TRUNCATED, WINDOWED, cut_samples
from mft_megatron.data.storage.ledger import OVERLONG
from tests.data.stores import stored_of

MASKS = st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=30).filter(lambda mask: any(mask[1:])), min_size=1)


def slow_cut(mask, length, overlong):
    """(outcome, windows with their targets, windows without a target) of one sample."""
    n = len(mask)
    if n <= length:
        return KEPT, [(0, n, sum(mask[1:]))], 0
    if overlong == "drop":
        return TOO_LONG, [], 0
    starts = {"split": range(0, n - 1, length - 1), "truncate": [0], "truncate-left": [n - length]}[overlong]
    windows = [(start, min(length, n - start)) for start in starts]
    windows = [(start, size, sum(mask[start + 1 : start + size])) for start, size in windows]
    useful = [window for window in windows if window[2]]
    if not useful:
        return CUT_TO_NOTHING, [], 0
    if overlong == "split":
        return WINDOWED, useful, len(windows) - len(useful)
    return TRUNCATED, useful, 0


@pytest.mark.parametrize("at_once", [1, 1 << 24])
@given(MASKS, st.integers(2, 12), st.sampled_from(OVERLONG))
def test_every_sample_is_cut_independently_of_the_others(at_once, masks, length, overlong):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "_TOKENS_AT_ONCE", at_once)
        stored = stored_of({"a": masks})
        cut = cut_samples(stored.lengths, stored.supervised, stored.mask, stored.task_ids, length, [overlong])
    expected = [slow_cut(mask, length, overlong) for mask in masks]
    assert cut.outcome.tolist() == [outcome for outcome, _, _ in expected]
    assert cut.unsupervised_windows.tolist() == [without for _, _, without in expected]
    slices = [(number, *window) for number, (_, windows, _) in enumerate(expected) for window in windows]
    found = [*zip(*(values.tolist() for values in cut.slices), cut.supervised.tolist(), strict=True)]
    assert found == slices


@given(MASKS, st.integers(2, 12))
def test_windows_hold_every_target_exactly_once(masks, length):
    stored = stored_of({"a": masks})
    cut = cut_samples(stored.lengths, stored.supervised, stored.mask, stored.task_ids, length, ["split"])
    kept = cut.outcome != CUT_TO_NOTHING
    assert kept.all()
    assert cut.supervised.sum() == stored.supervised.sum()
    assert cut.slices.lengths.max() <= length


def test_each_task_has_its_overlong():
    stored = stored_of({name: [[0, *[1] * 9]] for name in OVERLONG})
    cut = cut_samples(stored.lengths, stored.supervised, stored.mask, stored.task_ids, 4, list(OVERLONG))
    assert cut.outcome.tolist() == [TOO_LONG, TRUNCATED, TRUNCATED, WINDOWED]
    assert cut.slices.samples.tolist() == [1, 2, 3, 3, 3]
    assert cut.slices.starts.tolist() == [0, 6, 0, 3, 6]


def test_masks_of_samples_that_fit_are_not_read():
    stored = stored_of({"a": [[0, 1]] * 3})
    stored.mask.items = None
    cut = cut_samples(stored.lengths, stored.supervised, stored.mask, stored.task_ids, 2, ["split"])
    assert cut.supervised.tolist() == [1, 1, 1]


def test_truncating_from_the_left_keeps_the_end():
    stored = stored_of({"a": [[1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]]})
    arguments = (stored.lengths, stored.supervised, stored.mask, stored.task_ids, 3)
    assert cut_samples(*arguments, ["truncate"]).outcome.tolist() == [TRUNCATED, CUT_TO_NOTHING]
    assert cut_samples(*arguments, ["truncate-left"]).outcome.tolist() == [CUT_TO_NOTHING, TRUNCATED]
    assert np.array_equal(cut_samples(*arguments, ["truncate-left"]).slices.starts, [4])
