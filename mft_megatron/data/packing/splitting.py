"""Assignment of samples to the splits train, valid and test."""

import numpy as np

from mft_megatron.data.permutation import named_permutation

from .packing_options import SPLITS


def assign_splits(num_samples: int, weights: tuple[float, float, float], seed: int, task: str) -> np.ndarray:
    """Split of each sample of a task, uint8 [``num_samples``]: 0 train, 1 valid, 2 test.

    It depends on the arguments alone. The sizes follow the weights as closely as whole samples allow. A split with a
    weight gets at least one sample if another split has more than one: train is served first, then valid, then test.
    """
    wanted = [weight > 0 for weight in weights]
    fractions = np.array(weights) / sum(weights)
    sizes = np.floor(fractions * num_samples).astype(np.int64)
    for index in np.argsort(-(fractions * num_samples - sizes), kind="stable")[: num_samples - sizes.sum()]:
        sizes[index] += 1
    for index in range(len(SPLITS)):
        if wanted[index] and sizes[index] == 0 and sizes.max() > 1:
            sizes[sizes.argmax()] -= 1
            sizes[index] += 1
    split = np.empty(num_samples, np.uint8)
    split[named_permutation(f"{seed}/{task}", num_samples)] = np.repeat(np.arange(len(SPLITS), dtype=np.uint8), sizes)
    return split
