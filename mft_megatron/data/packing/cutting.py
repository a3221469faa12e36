"""What becomes of samples that are longer than a row: ``--overlong``.

A window's first token is never a target, since nothing in the window predicts it. So windows of a split sample overlap
by one token, and every supervised token of the sample is a target in exactly one of them.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mft_megatron.data.sample_slices import SampleSlices, ranges, supervised_tokens
from mft_megatron.data.storage.indexed_dataset import IndexedDataset

OVERLONG = ("drop", "truncate", "truncate-left", "split")
KEPT, TRUNCATED, WINDOWED, TOO_LONG, CUT_TO_NOTHING = range(5)  # what became of a sample
DROPPED = {TOO_LONG: "overlong", CUT_TO_NOTHING: "truncated_to_nothing"}  # the names they are counted under
_TOKENS_AT_ONCE = 1 << 24


@dataclasses.dataclass(frozen=True)
class Cut:
    """Slices of all samples, by sample and place. ``supervised`` int64 [slices]: targets that count. ``outcome`` uint8
    [samples]: KEPT, TRUNCATED, WINDOWED, TOO_LONG or CUT_TO_NOTHING. ``unsupervised_windows`` int64 [samples]."""

    slices: SampleSlices
    supervised: np.ndarray
    outcome: np.ndarray
    unsupervised_windows: np.ndarray


def cut(
    lengths: np.ndarray,
    supervised: np.ndarray,
    mask: IndexedDataset,
    task_ids: np.ndarray,
    seq_length: int,
    overlong_of_task: Sequence[str],
) -> Cut:
    """Cut the samples of a data set to ``seq_length``.

    Args:
        lengths: int [samples], tokens of each.
        supervised: int [samples], its targets that count.
        mask: the loss masks, of which only those of overlong samples are read.
        task_ids: uint16 [samples].
        seq_length: tokens of a row, at least 2.
        overlong_of_task: of :data:`OVERLONG`, by task.
    """
    outcome = np.zeros(len(lengths), np.uint8)
    long = np.flatnonzero(lengths > seq_length)
    policy = np.array([OVERLONG.index(name) for name in overlong_of_task], np.uint8)[task_ids[long]]
    outcome[long] = np.array([TOO_LONG, TRUNCATED, TRUNCATED, WINDOWED], np.uint8)[policy]
    windows = _windows(long, lengths[long].astype(np.int64), policy, seq_length)
    targets = _supervised_targets(mask, windows)
    empty = targets == 0
    lost = np.setdiff1d(windows.samples, windows.samples[~empty])  # no window of theirs has a target
    unsupervised = np.bincount(windows.samples[empty], minlength=len(lengths))
    unsupervised[outcome != WINDOWED] = 0
    outcome[lost] = CUT_TO_NOTHING
    unsupervised[lost] = 0
    windows, targets = windows.take(~empty), targets[~empty]

    whole = np.flatnonzero(outcome == KEPT)
    slices = [
        np.concatenate([whole, windows.samples]),
        np.concatenate([np.zeros(len(whole), np.int64), windows.starts]),
        np.concatenate([lengths[whole].astype(np.int64), windows.lengths]),
    ]
    order = np.lexsort((slices[1], slices[0]))
    all_targets = np.concatenate([supervised[whole].astype(np.int64), targets])
    return Cut(SampleSlices(*(values[order] for values in slices)), all_targets[order], outcome, unsupervised)


def _windows(samples: np.ndarray, lengths: np.ndarray, policy: np.ndarray, seq_length: int) -> SampleSlices:
    """The windows of overlong samples before any is left out."""
    step = seq_length - 1
    count = np.select([policy == 0, policy == 3], [0, -(-(lengths - 1) // step)], 1)
    number = ranges(np.zeros(len(samples), np.int64), count)
    of = np.repeat(np.arange(len(samples)), count)
    starts = np.where(policy[of] == 2, lengths[of] - seq_length, number * step)
    return SampleSlices(samples[of], starts, np.minimum(seq_length, lengths[of] - starts))


def _supervised_targets(mask: IndexedDataset, windows: SampleSlices) -> np.ndarray:
    """Supervised tokens of each window but its first, int64."""
    counts = np.zeros(len(windows.samples), np.int64)
    until = np.cumsum(windows.lengths)
    first = 0
    while first < len(counts):  # a bounded number of tokens at a time
        last = max(first + 1, int(np.searchsorted(until, until[first] + _TOKENS_AT_ONCE)))
        some = windows.take(slice(first, last))
        own = mask.items[ranges(mask.start_of(some.samples) + some.starts, some.lengths)]
        counts[first:last] = supervised_tokens(own, some.lengths)
        first = last
    return counts
