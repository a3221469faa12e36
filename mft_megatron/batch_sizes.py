"""The number of packs of each optimizer step, a pure function of the packs consumed before it.

::

    --global-batch-size N                        N from the first step on
    --rampup-batch-size START INCREMENT SAMPLES  START, START + INCREMENT … N, each for an equal part of SAMPLES packs
    --step-batch-size-schedule "0:A 2M:B"        A, and B once 2,000,000 tokens have been consumed
"""

import bisect
import dataclasses
import decimal
import itertools
from collections.abc import Sequence

from mft_megatron.errors import InputError

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """Batch sizes by consumed packs.

    Attributes:
        starts: number of consumed packs from which on each size holds, ascending from 0.
        sizes: packs of a step, one for each of ``starts``.
    """

    starts: Sequence[int]
    sizes: Sequence[int]

    def after(self, consumed_samples: int) -> int:
        """Packs of the step after ``consumed_samples`` packs."""
        return self.sizes[self._index(consumed_samples)]

    def remaining(self, consumed_samples: int) -> Sequence[int]:
        """Sizes of the step after ``consumed_samples`` packs and of all later steps, in order."""
        return self.sizes[self._index(consumed_samples) :]

    def steps(self, start: int, end: int) -> int:
        """Number of steps from ``start`` consumed packs on until ``end`` are consumed; the last one may be smaller."""
        steps, consumed = 0, start
        borders = [*self.starts[1:], end]
        for border, size in zip(borders, self.sizes, strict=True):
            more = max(-(-(min(border, end) - consumed) // size), 0)
            steps, consumed = steps + more, consumed + more * size
        return steps

    def consumed(self, start: int, steps: int) -> int:
        """Number of consumed packs after ``steps`` steps that begin after ``start`` consumed packs."""
        consumed = start
        for border, size in zip([*self.starts[1:], None], self.sizes, strict=True):
            taken = steps if border is None else min(max(-(-(border - consumed) // size), 0), steps)
            consumed, steps = consumed + taken * size, steps - taken
        return consumed

    def _index(self, consumed_samples: int) -> int:
        return bisect.bisect_right(self.starts, consumed_samples) - 1


def ramp_up(start: int, increment: int, samples: int, end: int) -> BatchSizes:
    """Batch sizes from ``start`` to ``end`` by ``increment``, which must divide the difference.

    Megatron-Core divides in floating point and may take one more step of the smaller size if a part of ``samples``
    ends exactly with a step.

    Args:
        start, increment, end: packs of a step.
        samples: consumed packs from which on the size is ``end``.
    """
    steps = (end - start) // increment
    # Size k holds from the first number of packs for which consumed × steps / samples is at least k.
    starts = [-(-k * samples // steps) for k in range(steps + 1)]
    return BatchSizes(starts, range(start, end + 1, increment))


def step_schedule(text: str, seq_length: int) -> BatchSizes:
    """Parse ``THRESHOLD:SIZE …``.

    Args:
        text: thresholds in consumed tokens, as in Megatron-LM, and sizes in packs.
        seq_length: tokens of a pack.

    Raises:
        InputError: the text is no such list, does not begin with 0, or has a threshold twice.
    """
    option = f"--step-batch-size-schedule {text!r}"
    pairs = []
    for entry in text.replace(",", " ").split():
        threshold, colon, size = entry.partition(":")
        tokens, packs = _count(threshold), _count(size)
        if not colon or tokens is None or packs is None or packs < 1 or packs % 1:
            raise InputError(f"{option}: {entry!r} is not THRESHOLD:SIZE, tokens and packs as in 2.4B:320")
        pairs.append((int(tokens) // seq_length, int(packs), threshold))
    pairs.sort(key=lambda pair: pair[0])
    if not pairs or pairs[0][0]:
        raise InputError(f"{option}: the first threshold must be 0, as in 0:16 2.4B:320")
    for (before, _, name), (start, _, other) in itertools.pairwise(pairs):
        if start == before:
            raise InputError(
                f"{option}: thresholds {name} and {other} are less than a pack of {seq_length} tokens apart; leave one "
                "of them out"
            )
    return BatchSizes([start for start, _, _ in pairs], [size for _, size, _ in pairs])


def _count(text: str) -> decimal.Decimal | None:
    """Parse a number such as ``2.4B`` that is not negative; ``None`` for anything else."""
    factor = _SUFFIXES.get(text[-1:].upper(), 1)
    try:
        value = decimal.Decimal(text if factor == 1 else text[:-1]) * factor
    except decimal.InvalidOperation:
        return None
    return value if value.is_finite() and 0 <= value < 2**63 else None
