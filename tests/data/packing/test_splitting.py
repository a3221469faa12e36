"""Splits follow their weights and depend on nothing but seed and task."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mft_megatron.data.packing.splitting import assign_splits


@given(st.integers(0, 400), st.tuples(*[st.integers(0, 100)] * 3).filter(any), st.integers(0, 9))
def test_splits_follow_the_weights(samples, weights, seed):
    split = assign_splits(samples, tuple(map(float, weights)), seed, "task")
    sizes = np.bincount(split, minlength=3)
    assert sizes.sum() == samples
    for size, weight in zip(sizes, weights, strict=True):
        assert abs(size - samples * weight / sum(weights)) <= 2
        assert size == 0 or weight > 0
        assert size > 0 or weight == 0 or samples < sum(w > 0 for w in weights)


def test_splits_depend_on_seed_and_task_only():
    base = assign_splits(100, (80, 20, 0), 1, "a")
    np.testing.assert_array_equal(base, assign_splits(100, (80, 20, 0), 1, "a"))
    assert (base != assign_splits(100, (80, 20, 0), 2, "a")).any()
    assert (base != assign_splits(100, (80, 20, 0), 1, "b")).any()
    assert 0 < base[:50].sum() < base.sum()  # not simply the end of the file
