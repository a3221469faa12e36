"""Permutations that are given by a name: the same on every machine and with every version of numpy."""

import hashlib

import numpy as np

from . import _sample_index


def named_permutation(name: str, n: int) -> np.ndarray:
    """Permutation of 0 … n - 1, int64 [n], that depends on ``name`` and ``n`` alone."""
    return _sample_index.epoch_order(n, named_seed(name))


def named_seed(name: str) -> int:
    """Seed of 64 bits that depends on ``name`` alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
