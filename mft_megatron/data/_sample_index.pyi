"""The C++ sample index; the contracts are in csrc/sample_index.hpp.

Arrays are C-contiguous and of exactly the dtype that is named: nothing is converted, another dtype raises TypeError.
Bad values raise ValueError with the numbers. All functions are deterministic and release the GIL.
"""

import numpy as np
from numpy.typing import NDArray

def best_fit_decreasing(lengths: NDArray[np.int32], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack samples by best-fit decreasing: from the longest to the shortest, each into the fullest pack that fits it.

    Args:
        lengths: int32 [n], tokens of each sample, 1 … capacity.
        capacity: tokens of a pack.

    Returns:
        indices: int64 [n], of the samples, pack after pack.
        offsets: int64 [packs + 1]; offsets[p] … offsets[p + 1] are the samples of pack p in ``indices``.
    """

def best_fit_mixed(
    lengths: NDArray[np.int32], groups: NDArray[np.int32], capacity: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack samples by best fit so that the samples of each group are spread evenly over the packs.

    Samples longer than a quarter of a pack come first, from the longest to the shortest, then all others in the order
    of :func:`mixed_order`, each into the fullest pack that fits it.

    Args:
        lengths: int32 [n], tokens of each sample, 1 … capacity.
        groups: int32 [n], group of each sample, 0 … 2^16.
        capacity: tokens of a pack.
        seed: 0 … 2^64 - 1.

    Returns:
        indices, offsets: as of :func:`best_fit_decreasing`.
    """

def balance(costs: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    """Distribute rows over ranks: equally many on each, and about the same cost.

    Args:
        costs: int64 [n], none negative; n is a multiple of ``ranks``.
        ranks: number of ranks.

    Returns:
        indices: int64 [ranks, n / ranks], rows of each rank, from the most expensive to the cheapest.
    """

def count_packs(
    sample_numbers: NDArray[np.int64],
    offsets: NDArray[np.int64],
    task_of_sample: NDArray[np.uint16],
    supervised_of_sample: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Count the supervised tokens, and the samples that have any, of each task in each pack.

    Args:
        sample_numbers: int64 [m], indices of samples, pack after pack.
        offsets: int64 [packs + 1], as :func:`best_fit_decreasing` returns them.
        task_of_sample: uint16 [n], of all samples.
        supervised_of_sample: int64 [n], supervised targets of all samples.

    Returns:
        int64 [4, entries]: pack, task, supervised tokens, samples; one entry for each task of a pack, by pack, then
        task.
    """

def epoch_order(n: int, seed: int) -> NDArray[np.int64]:
    """Permutation of 0 … n - 1, int64 [n], that depends on ``n`` and ``seed`` (0 … 2^64 - 1) alone."""

def mixed_order(groups: NDArray[np.int32], seed: int) -> NDArray[np.int64]:
    """Random order of items in which the items of each group are spread evenly.

    Args:
        groups: int32 [n], group of each item, 0 … 2^16.
        seed: 0 … 2^64 - 1.

    Returns:
        indices: int64 [n], of the items.
    """

def rarest_tasks(
    packs: NDArray[np.int64], tasks: NDArray[np.int64], supervised_tokens: NDArray[np.int64], num_packs: int
) -> NDArray[np.int32]:
    """Find the rarest task of each pack: of those with a supervised token in it the one that the fewest packs have.

    Of equal ones it is the one with the lowest number; a pack without a supervised token has 2^16.

    Args:
        packs, tasks, supervised_tokens: int64 [entries], rows of what :func:`count_packs` returns.
        num_packs: packs of the split.

    Returns:
        int32 [packs].
    """
