"""Counts of tasks whose samples and turns all have weight 1."""

import numpy as np

from mft_megatron.batch import TaskCounts


def counted(tokens_K, samples_K):
    """``TaskCounts`` of supervised tokens and samples, int [K] each."""
    tokens_K, samples_K = np.asarray(tokens_K, np.int64), np.asarray(samples_K, np.int64)
    return TaskCounts(tokens_K, samples_K, tokens_K.astype(np.float64), samples_K.astype(np.float64))
