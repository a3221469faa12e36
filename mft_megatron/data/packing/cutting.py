"""Cutting samples that are longer than a pack: ``--overlong``.

A window's first token is never a target, since nothing in the window predicts it. So windows of a split sample overlap
by one token, and every supervised token of the sample is a target in exactly one of them.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from mft_megatron.data.sample_slices import SampleSlices, ranges, supervised_tokens, weight_sums
from mft_megatron.data.storage.indexed_dataset import IndexedDataset
from mft_megatron.data.storage.ledger import OVERLONG
from mft_megatron.data.storage.weights import StoredWeights

# outcomes of a sample; those up to WINDOWED keep it
KEPT, TRUNCATED, WINDOWED, TOO_LONG, CUT_TO_NOTHING = range(5)
# names in the ledger of the outcomes that drop a sample
DROPPED = {TOO_LONG: "overlong", CUT_TO_NOTHING: "truncated_to_nothing"}
# memory holds the masks of so many tokens at a time
_TOKENS_AT_ONCE = 1 << 20


@dataclasses.dataclass(frozen=True)
class CutSamples:
    """All samples of a data set, cut for one length.

    Attributes:
        slices: of the samples that are kept, ordered by sample, then by start.
        supervised: int64 [slices], supervised targets.
        weights: float64 [slices], sum of the weights of turns over these targets; ``None`` where all weights are 1.
        outcome: uint8 [samples], KEPT, TRUNCATED, WINDOWED, TOO_LONG or CUT_TO_NOTHING.
        unsupervised_windows: int64 [samples], windows left out because they have no supervised target.
    """

    slices: SampleSlices
    supervised: np.ndarray
    weights: np.ndarray | None
    outcome: np.ndarray
    unsupervised_windows: np.ndarray


def cut_samples(
    lengths: np.ndarray,
    supervised: np.ndarray,
    mask: IndexedDataset,
    task_ids: np.ndarray,
    seq_length: int,
    overlong_of_task: Sequence[str],
    weights: StoredWeights | None = None,
) -> CutSamples:
    """Cut the samples of a data set to ``seq_length``.

    Args:
        lengths: int [samples], tokens.
        supervised: int [samples], supervised targets.
        mask: loss masks, of which only those of overlong samples are read.
        task_ids: uint16 [samples].
        seq_length: tokens of a pack, at least 2.
        overlong_of_task: a value of :data:`mft_megatron.data.storage.ledger.OVERLONG` for each task.
        weights: of the samples; ``None`` where all are 1.
    """
    outcome = np.zeros(len(lengths), np.uint8)
    long = np.flatnonzero(lengths > seq_length)
    policy = np.array([OVERLONG.index(name) for name in overlong_of_task], np.uint8)[task_ids[long]]
    outcome[long] = np.array([TOO_LONG, TRUNCATED, TRUNCATED, WINDOWED], np.uint8)[policy]
    windows = _windows(long, lengths[long].astype(np.int64), policy, seq_length)
    targets = _of_windows(mask, windows, supervised_tokens)
    empty = targets == 0
    with_target = np.zeros(len(lengths), bool)
    with_target[windows.samples[~empty]] = True
    without_target = windows.samples[~with_target[windows.samples]]
    unsupervised = np.bincount(windows.samples[empty], minlength=len(lengths))
    unsupervised[outcome != WINDOWED] = 0
    outcome[without_target] = CUT_TO_NOTHING
    unsupervised[without_target] = 0
    windows, targets = windows.take(~empty), targets[~empty]

    whole = np.flatnonzero(outcome == KEPT)
    slices = [
        np.concatenate([whole, windows.samples]),
        np.concatenate([np.zeros(len(whole), np.int64), windows.starts]),
        np.concatenate([lengths[whole].astype(np.int64), windows.lengths]),
    ]
    order = np.lexsort((slices[1], slices[0]))
    all_targets = np.concatenate([supervised[whole].astype(np.int64), targets])
    sums = None
    if weights is not None:
        of_windows = targets if weights.tokens is None else _of_windows(weights.tokens, windows, weight_sums)
        sums = np.concatenate([weights.sums[whole], of_windows.astype(np.float64)])[order]
    cut = SampleSlices(*(values[order] for values in slices))
    return CutSamples(cut, all_targets[order], sums, outcome, unsupervised)


def _windows(samples: np.ndarray, lengths: np.ndarray, policy: np.ndarray, seq_length: int) -> SampleSlices:
    """Windows of overlong samples, including those without a target.

    Args:
        samples: int64 [N], indices.
        lengths: int64 [N], tokens.
        policy: uint8 [N], index into :data:`mft_megatron.data.storage.ledger.OVERLONG`.
    """
    step = seq_length - 1
    count = np.select([policy == 0, policy == 3], [0, -(-(lengths - 1) // step)], 1)
    window_of_sample = ranges(np.zeros(len(samples), np.int64), count)
    index = np.repeat(np.arange(len(samples)), count)
    starts = np.where(policy[index] == 2, lengths[index] - seq_length, window_of_sample * step)
    return SampleSlices(samples[index], starts, np.minimum(seq_length, lengths[index] - starts))


def _of_windows(
    items: IndexedDataset, windows: SampleSlices, counted: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Count or sum up something in each window.

    Args:
        items: of all samples: masks, or weights.
        windows: W slices.
        counted: from items of some windows, concatenated, and the windows' lengths to a number of each.

    Returns:
        [W], int64 or float64 as ``counted``.
    """
    counts: list[np.ndarray] = [np.zeros(0, np.int64)]
    ends = np.cumsum(windows.lengths)
    first = 0
    while first < len(ends):
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + _TOKENS_AT_ONCE)))
        block = windows.take(slice(first, last))
        block_items = items.items[ranges(items.start_of(block.samples) + block.starts, block.lengths)]
        counts.append(counted(block_items, block.lengths))
        first = last
    return np.concatenate(counts)
