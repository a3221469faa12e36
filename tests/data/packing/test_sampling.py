"""Uses of samples: exact counts for every ratio, temperature and cap."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mft_megatron.data.packing.sampling import task_ratios, uses_of_samples


@given(st.integers(1, 200), st.floats(0.01, 5), st.integers(1, 4))
def test_uses_add_up_and_differ_by_one_at_most(samples, ratio, epochs):
    uses = uses_of_samples(samples, ratio, epochs, "name")
    assert uses.sum() == max(round(ratio * epochs * samples), 1)
    assert uses.max() - uses.min() <= 1


def test_a_whole_ratio_uses_every_sample_alike():
    assert uses_of_samples(5, 1.0, 1, "x").tolist() == [1] * 5
    assert uses_of_samples(5, 0.5, 2, "x").tolist() == [1] * 5
    assert uses_of_samples(5, 3.0, 1, "x").tolist() == [3] * 5
    assert uses_of_samples(0, 3.0, 1, "x").tolist() == []


def test_the_name_decides_which_samples_get_one_more_use():
    half = [uses_of_samples(100, 0.5, 1, name) for name in ("1/a", "1/a", "2/a")]
    assert np.array_equal(half[0], half[1])
    assert not np.array_equal(half[0], half[2])
    assert 0 < half[0][:50].sum() < 50


def test_a_temperature_flattens_the_ratios_and_keeps_the_total():
    samples = np.array([1000, 100, 10, 0])
    for temperature, expected in ((1, [1000, 100, 10, 0]), (1e9, [370, 370, 370, 0])):
        used = task_ratios(samples, {}, temperature) * samples
        np.testing.assert_allclose(used, expected, rtol=1e-6)
    used = task_ratios(samples, {}, 2.0) * samples
    np.testing.assert_allclose(used / used.sum(), np.sqrt(samples) / np.sqrt(samples).sum())
    assert used.sum() == pytest.approx(1110)


def test_given_ratios_and_caps():
    samples = np.array([1000, 10])
    assert task_ratios(samples, {1: 7.0}).tolist() == [1.0, 7.0]
    assert task_ratios(samples, {1: 7.0}, max_epochs=4).tolist() == [1.0, 4.0]
    assert task_ratios(samples, {}, 1e9, max_epochs=4).tolist() == [pytest.approx(0.505), 4.0]
