"""How far a value is above the last ones of its series, in standard deviations that outliers do not move."""

from typing import TypedDict

import numpy as np
import torch

# the median absolute deviation of a normal distribution times this is its standard deviation
MAD_TO_DEVIATION = 1.4826


class WindowState(TypedDict):
    """The window in a checkpoint: the last values of each series, oldest first, fp64 [values] each."""

    values: list[torch.Tensor]


class RobustWindow:
    """The last values of some series.

    A new value is judged by its distance from the median in units of 1.4826 × MAD (Iglewicz and Hoaglin 1993, "How to
    detect and handle outliers"), one-sided. Where values hardly vary the unit is a least one instead.
    """

    def __init__(self, num_series: int, size: int, least_part: float = 0.0, least: float = 0.0):
        """
        Args:
            num_series: number of series, S.
            size: values of each that are kept.
            least_part: the smallest unit, as a part of the median.
            least: the smallest unit.
        """
        self._size, self._least_part, self._least = size, least_part, least
        # columns hold the newest value last; NaN where none is known
        self._values_SW = np.full((num_series, size), np.nan)

    def score(self, value_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compare new values with the window.

        Args:
            value_S: fp64 [S]; NaN for a series that has none.

        Returns:
            score_S: fp64 [S], robust standard deviations above the median; NaN where there is no value, or fewer than a
                quarter of the window is known.
            median_S: fp64 [S].
        """
        known_S = (~np.isnan(self._values_SW)).sum(1)
        median_S = _median(self._values_SW, known_S)
        deviation_S = _median(np.abs(self._values_SW - median_S[:, None]), known_S)
        least_S = np.maximum(self._least_part * np.abs(median_S), self._least)
        unit_S = np.maximum(MAD_TO_DEVIATION * deviation_S, least_S)
        with np.errstate(divide="ignore", invalid="ignore"):
            score_S = (value_S - median_S) / unit_S
        return np.where(known_S >= -(-self._size // 4), score_S, np.nan), median_S

    def add(self, value_S: np.ndarray) -> None:
        """Add a value to each series that has one; ``value_S`` fp64 [S], NaN where there is none."""
        has_S = ~np.isnan(value_S)
        self._values_SW[has_S, :-1] = self._values_SW[has_S, 1:]
        self._values_SW[has_S, -1] = value_S[has_S]

    def state(self) -> WindowState:
        """The state for a checkpoint."""
        return {"values": [torch.from_numpy(values[~np.isnan(values)]) for values in self._values_SW]}

    def load(self, state: WindowState) -> None:
        """Continue from the state of a window over as many series; of a longer one with its last values."""
        self._values_SW[:] = np.nan
        for row, values in zip(self._values_SW, state["values"], strict=True):
            last = values.numpy()[-self._size :]
            row[self._size - len(last) :] = last


def _median(values_SW: np.ndarray, known_S: np.ndarray) -> np.ndarray:
    """Median of the values that are known of each series; NaN where none is."""
    sorted_SW = np.sort(values_SW, axis=1)  # NaN last
    series = np.arange(len(values_SW))
    low_S, high_S = np.maximum(known_S - 1, 0) // 2, np.minimum(known_S // 2, values_SW.shape[1] - 1)
    return (sorted_SW[series, low_S] + sorted_SW[series, high_S]) / 2
