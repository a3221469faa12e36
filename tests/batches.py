"""Micro-batches made by hand."""

import numpy as np

from mft_megatron.batch import Batch


def one_segment(tokens):
    """Tokens as a micro-batch of one sample without padding; every token's label is the next, nothing is supervised."""
    tokens = np.asarray(tokens, np.int64).reshape(1, -1)
    zeros, positions = np.zeros_like(tokens), np.arange(tokens.size)[None]
    cu_seqlens = np.array([0, tokens.size], np.int32)
    labels = np.roll(tokens, -1)
    return Batch(tokens, labels, zeros.astype(np.uint8), positions, zeros, zeros, cu_seqlens, tokens.size)
