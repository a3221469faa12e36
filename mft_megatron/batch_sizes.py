"""How many packs each optimizer step has: a pure function of the packs consumed before it.

::

    --global-batch-size N                        N from the first step on
    --rampup-batch-size START INCREMENT SAMPLES  START, START + INCREMENT … N, each for the same share of SAMPLES packs
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
    """``starts``: from how many consumed packs on each of the ``sizes`` holds; rising from 0."""

    starts: Sequence[int]
    sizes: Sequence[int]

    def after(self, consumed_samples: int) -> int:
        """Packs of the step that comes after so many."""
        return self.sizes[self._place(consumed_samples)]

    def from_then_on(self, consumed_samples: int) -> Sequence[int]:
        """The sizes of that step and of all later ones, in their order."""
        return self.sizes[self._place(consumed_samples) :]

    def _place(self, consumed_samples: int) -> int:
        return bisect.bisect_right(self.starts, consumed_samples) - 1


def ramp_up(start: int, increment: int, samples: int, end: int) -> BatchSizes:
    """``start`` … ``end`` in steps of ``increment``, which divides their difference; ``end`` after ``samples`` packs.

    Megatron-Core divides in floating point, so that it may take one more step of the smaller size where a share of
    ``samples`` ends exactly with a step.
    """
    steps = (end - start) // increment
    # step k begins where consumed × steps / samples reaches k
    starts = [-(-number * samples // steps) for number in range(steps + 1)]
    return BatchSizes(starts, range(start, end + 1, increment))


def step_schedule(text: str, seq_length: int) -> BatchSizes:
    """``THRESHOLD:SIZE …``, with thresholds in tokens as Megatron-LM takes them: ``seq_length`` for each pack.

    Raises:
        InputError: not such a list, or one that does not begin with 0 or has a threshold twice.
    """
    option = f"--step-batch-size-schedule {text!r}"
    pairs = []
    for entry in text.replace(",", " ").split():
        threshold, colon, size = entry.partition(":")
        tokens, packs = _number(threshold), _number(size)
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


def _number(text: str) -> decimal.Decimal | None:
    """``2.4B`` as a number that is not negative."""
    factor = _SUFFIXES.get(text[-1:].upper(), 1)
    try:
        value = decimal.Decimal(text if factor == 1 else text[:-1]) * factor
    except decimal.InvalidOperation:
        return None
    return value if value.is_finite() and 0 <= value < 2**63 else None
