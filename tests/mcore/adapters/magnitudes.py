"""Magnitudes of a whole matrix from their second level, which a run computes row by row."""

from mft_megatron.mcore.adapters import nf4


def expand_all(magnitudes):
    """Compute the magnitudes of all blocks of a matrix, fp32 [blocks]."""
    codes = magnitudes.codes
    largest = magnitudes.largest.repeat_interleave(nf4.GROUP)[: codes.numel()]
    return nf4.expand(codes, largest, magnitudes.offset)
