"""The order of the packs in an epoch: a permutation named by data set, split, seed and epoch.

Version 1 is any permutation. Version 2 mixes tasks: packs are grouped by their rarest task, the one that the fewest
packs of the split have supervised tokens of, and every part of the epoch has about the same share of each group. So a
rare task is in as many steps as it can be, for any batch size. Within that the order is random, and it has no periods
that evaluations or checkpoints could coincide with. A data set names its version, and a run that resumes keeps the one
that it began with.
"""

import functools

import numpy as np

from mft_megatron.data import _sample_index
from mft_megatron.data.permutation import named_permutation, named_seed

from .dataset import PackedSplit


@functools.lru_cache(maxsize=4)
def epoch_order(split: PackedSplit, seed: int, epoch: int, version: int) -> np.ndarray:
    """Order of the packs in one epoch, int64 [packs], read-only.

    Raises:
        ValueError: there is no such version.
    """
    name = f"{split.dataset.dataset_hash}/{split.name}/{seed}/{epoch}"
    if version == 1:
        order = named_permutation(name, split.num_packs)
    elif version == 2:
        order = _sample_index.mixed_order(split.rarest_tasks, named_seed(name))
    else:
        raise ValueError(f"order version {version}")
    order.setflags(write=False)
    return order
