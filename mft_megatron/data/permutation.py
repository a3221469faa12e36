"""Orders that are named: the same name gives the same order on every machine and with every library version."""

import hashlib

import numpy as np

from . import _sample_index


def named_order(name: str, n: int) -> np.ndarray:
    """A permutation of 0 … n - 1, int64, that depends on ``name`` alone."""
    return _sample_index.epoch_order(n, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
