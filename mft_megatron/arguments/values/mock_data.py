"""Lengths of the samples of a task that does not exist, the values of ``--mock-data``."""

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

LONGEST = 2**30  # tokens of a sample
# by its word: how many numbers a distribution has
_NUMBERS = {"uniform": 2, "lognormal": 2}
FORMS = (
    "[NAME=]N, [NAME=]uniform:SHORTEST:LONGEST, [NAME=]lognormal:MEAN:SIGMA (mean in tokens, standard deviation of the "
    "logarithm) or [NAME=]FILE with a length on each line"
)


@dataclasses.dataclass(frozen=True)
class MockTask:
    """A task of mock data.

    Attributes:
        text: as the user wrote it, without the name.
        name: of the task; ``None`` where none was given.
        distribution: "uniform", "lognormal", or "lengths", which are used in turn.
        numbers: shortest and longest length; mean and sigma; or the lengths.
    """

    text: str
    name: str | None
    distribution: str
    numbers: tuple[float, ...]

    def lengths(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Draw the lengths of ``count`` samples: int64 [count], at least 2 tokens each."""
        if self.distribution == "uniform":
            shortest, longest = map(int, self.numbers)
            drawn = random.integers(shortest, longest, count, endpoint=True)
        elif self.distribution == "lognormal":
            mean, sigma = self.numbers
            drawn = random.lognormal(math.log(mean) - sigma**2 / 2, sigma, count).clip(max=LONGEST).astype(np.int64)
        else:
            drawn = np.resize(np.array(self.numbers, np.int64), count)
        return drawn.clip(min=2)


class LengthsError(argparse.ArgumentTypeError, ValueError):
    """A value that is not of :data:`FORMS`; argparse prints its message as it is."""


def mock_task(text: str) -> MockTask:
    """Parse one value of ``--mock-data``; see :data:`FORMS`.

    Raises:
        LengthsError: it has none of these forms, or a length is not from 2 to 2^30 tokens.
    """
    try:
        return _parsed(text)
    except ValueError as error:
        raise LengthsError(f"{text}: {error}; give {FORMS}") from None


def _parsed(text: str) -> MockTask:
    name, _, form = text.rpartition("=")
    word, *fields = form.split(":")
    if word in _NUMBERS and len(fields) == _NUMBERS[word]:
        return MockTask(form, name or None, word, _CHECKS[word](fields))
    lengths = (int(form),) if form.isdecimal() else _of_file(Path(form))
    if not lengths or not all(2 <= length <= LONGEST for length in lengths):
        raise ValueError("lengths must be from 2 to 2^30 tokens")
    return MockTask(form, name or None, "lengths", lengths)


def _uniform(fields: Sequence[str]) -> tuple[float, ...]:
    shortest, longest = (int(field) for field in fields)
    if not 2 <= shortest <= longest <= LONGEST:
        raise ValueError("lengths must be from 2 to 2^30 tokens, the shortest first")
    return shortest, longest


def _lognormal(fields: Sequence[str]) -> tuple[float, ...]:
    mean, sigma = (float(field) for field in fields)
    if not (2 <= mean <= LONGEST and 0 <= sigma <= 5):
        raise ValueError("the mean must be from 2 to 2^30 tokens, sigma from 0 to 5")
    return mean, sigma


_CHECKS: dict[str, Callable[[Sequence[str]], tuple[float, ...]]] = {"uniform": _uniform, "lognormal": _lognormal}


def _of_file(path: Path) -> tuple[float, ...]:
    try:
        return tuple(int(line) for line in path.read_text().split())
    except OSError as error:
        raise ValueError(error.strerror) from None
