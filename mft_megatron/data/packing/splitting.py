"""Which split each sample belongs to."""

import numpy as np

from mft_megatron.data.permutation import named_permutation

from .packs import SPLITS


def assign_splits(samples: int, weights: tuple[float, float, float], seed: int, task: str) -> np.ndarray:
    """Split of each sample of a task, uint8: 0 train, 1 valid, 2 test; the same for the same seed and task.

    Shares follow the weights as closely as whole samples allow. A split with a weight gets at least one sample where
    there are samples to spare, training first.
    """
    wanted = [weight > 0 for weight in weights]
    shares = np.array(weights) / sum(weights)
    sizes = np.floor(shares * samples).astype(np.int64)
    for number in np.argsort(-(shares * samples - sizes), kind="stable")[: samples - sizes.sum()]:
        sizes[number] += 1
    for number in range(len(SPLITS)):
        if wanted[number] and sizes[number] == 0 and sizes.max() > 1:
            sizes[sizes.argmax()] -= 1
            sizes[number] += 1
    split = np.empty(samples, np.uint8)
    split[named_permutation(f"{seed}/{task}", samples)] = np.repeat(np.arange(len(SPLITS), dtype=np.uint8), sizes)
    return split
