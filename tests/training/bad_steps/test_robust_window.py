"""Scores of a window equal formulas written out with the standard library; values of other series do not matter."""

import math
import random
import statistics

import numpy as np
import pytest

from mft_megatron.training.bad_steps.robust_window import RobustWindow


def score(values, new, least):
    """(new - median) / (1.4826 · median absolute deviation, or the least unit)."""
    median = statistics.median(values)
    deviation = statistics.median(abs(value - median) for value in values)
    return (new - median) / max(1.4826 * deviation, least)


@pytest.mark.parametrize("size", [16, 17])
@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_the_last_values_of_each_series(size, seed):
    draw = random.Random(seed)
    window, series = RobustWindow(3, size, least_part=0.01), [[], [], []]
    for _ in range(50):
        new = [draw.lognormvariate(0, 1) if draw.random() < part else math.nan for part in (1.0, 0.5, 0.1)]
        score_S, median_S = window.score(np.array(new))
        for index, value in enumerate(new):
            known = series[index][-size:]
            if len(known) * 4 < size or math.isnan(value):
                assert math.isnan(score_S[index])
            else:
                median = statistics.median(known)
                assert median_S[index] == pytest.approx(median)
                assert score_S[index] == pytest.approx(score(known, value, 0.01 * median))
        window.add(np.array(new))
        for index, value in enumerate(new):
            series[index] += [] if math.isnan(value) else [value]


def test_where_values_do_not_vary_the_unit_is_the_least_one():
    window = RobustWindow(1, 16, least_part=0.01, least=0.5)
    for _ in range(16):
        window.add(np.array([10.0]))
    assert window.score(np.array([11.0]))[0][0] == pytest.approx(2)
    window = RobustWindow(1, 16, least_part=0.01)
    for _ in range(16):
        window.add(np.array([10.0]))
    assert window.score(np.array([11.0]))[0][0] == pytest.approx(10)


def test_an_outlier_that_was_accepted_hardly_moves_the_score_of_the_next():
    draw = random.Random(1)
    values = [draw.gauss(1, 0.1) for _ in range(64)]
    window, other = RobustWindow(1, 64), RobustWindow(1, 64)
    for index, value in enumerate(values):
        window.add(np.array([value]))
        other.add(np.array([1000.0 if index == 40 else value]))
    assert other.score(np.array([2.0]))[0][0] == pytest.approx(window.score(np.array([2.0]))[0][0], rel=0.1)


@pytest.mark.parametrize("smaller", [False, True])
def test_a_window_continues_from_its_state_also_when_it_is_shorter(smaller):
    first, draw = RobustWindow(2, 32), random.Random(2)
    for step in range(40):
        first.add(np.array([draw.random(), draw.random() if step % 3 else math.nan]))
    second = RobustWindow(2, 16 if smaller else 32)
    second.load(first.state())
    assert [values.tolist() for values in second.state()["values"]] == [
        values.tolist()[-16 if smaller else 0 :] for values in first.state()["values"]
    ]
    if not smaller:
        assert first.score(np.ones(2))[0].tolist() == second.score(np.ones(2))[0].tolist()
