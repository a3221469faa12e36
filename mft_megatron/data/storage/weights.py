"""Weights of samples and tokens on disk; a data set whose weights are all 1 has no such file.

``P_sample_weights.npy``: float32 [samples], above 0. ``P_token_weights.bin``, ``.idx``: MMIDIDX of float32 with the
shape of the loss mask, the weight of the turn at each supervised token and 0 elsewhere.

Sums are of fp64 and add the values one by one in their order (:func:`numpy.bincount`), so they have the same bits on
every machine.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mft_megatron.data.sample_slices import weight_sums

from .arrays import load_array
from .dataset_writer import DatasetWriter
from .indexed_dataset import IndexedDataset, IndexedDatasetWriter

SAMPLE_WEIGHTS, TOKEN_WEIGHTS = "_sample_weights.npy", "_token_weights"
# sequences of masks that are read back, or of weights that are summed, at a time
_AT_ONCE = 1 << 14


@dataclasses.dataclass(frozen=True)
class StoredWeights:
    """The weights of stored samples, of which some are not 1.

    Attributes:
        samples: float32 [samples], weight of each.
        sums: float64 [samples], sum of the weights of its turns over its supervised targets.
        tokens: weight of the turn of each token, float32; ``None`` where all are 0 or 1.
    """

    samples: np.ndarray
    sums: np.ndarray
    tokens: IndexedDataset | None


class WeightsWriter:
    """Writes the weights of samples while these are appended; files are begun at the first weight other than 1."""

    def __init__(self, files: DatasetWriter, masks: IndexedDatasetWriter):
        """Prepare for samples whose masks ``masks`` writes."""
        self._files, self._masks = files, masks
        self._tokens: IndexedDatasetWriter | None = None
        self._samples: list[np.ndarray] = []
        self._sums: list[np.ndarray] = []

    def add(
        self,
        mask: np.ndarray,
        lengths: np.ndarray,
        supervised: np.ndarray,
        token_weights: np.ndarray | None,
        sample_weights: np.ndarray | None,
    ) -> None:
        """Append the weights of samples; call it before their masks are appended.

        Args:
            mask: uint8 [tokens], 1 where a token is supervised.
            lengths: int32 [samples], tokens of each.
            supervised: int64 [samples], supervised targets of each.
            token_weights: float32 [tokens], above 0 where the mask is 1; ``None`` where all are 1.
            sample_weights: float32 [samples], above 0; ``None`` where all are 1.
        """
        if token_weights is not None and np.array_equal(token_weights, mask):
            # all are 1 in fp32, or the samples with others were left out
            token_weights = None
        if token_weights is not None and self._tokens is None:
            bin_path, idx_path = (self._files.new(f"{TOKEN_WEIGHTS}{end}") for end in (".bin", ".idx"))
            self._tokens = IndexedDatasetWriter(bin_path, idx_path, np.float32)
            for items, of_items in self._masks.written(_AT_ONCE):
                self._tokens.add(items, of_items)
        if self._tokens is not None:
            self._tokens.add(mask if token_weights is None else token_weights, lengths)
        ones = np.ones(len(lengths), np.float32)
        self._samples.append(ones if sample_weights is None else sample_weights.astype(np.float32))
        sums = supervised.astype(np.float64) if token_weights is None else weight_sums(token_weights, lengths)
        self._sums.append(sums)

    def finish(self) -> StoredWeights | None:
        """Complete the files; ``None`` where all weights are 1."""
        samples = np.concatenate([np.zeros(0, np.float32), *self._samples])
        weighted = bool((samples != 1).any())
        if weighted:
            self._files.save(SAMPLE_WEIGHTS, samples)
        tokens = None
        if self._tokens is not None:
            self._tokens.finish()
            tokens = IndexedDataset(bin_path=self._tokens.bin_path, idx_path=self._tokens.idx_path)
        if not weighted and tokens is None:
            return None
        return StoredWeights(samples, np.concatenate([np.zeros(0), *self._sums]), tokens)

    def close(self) -> None:
        """Close the file of tokens, complete or not."""
        if self._tokens is not None:
            self._tokens.close()


def load_sample_weights(prefix: str | Path, arrays: Mapping[str, object]) -> np.ndarray | None:
    """Memory-map the weights of the samples of a data set, float32 [samples]; ``None`` where all are 1.

    Args:
        prefix: of the data set.
        arrays: its files in the ledger, by suffix.

    Raises:
        InputError: the file is damaged.
    """
    return load_array(f"{prefix}{SAMPLE_WEIGHTS}", np.float32, 1) if SAMPLE_WEIGHTS in arrays else None


def load_token_weights(prefix: str | Path, arrays: Mapping[str, object]) -> IndexedDataset | None:
    """Open the weights of the tokens of a data set; ``None`` where all are 0 or 1. Arguments and errors as above."""
    return IndexedDataset(f"{prefix}{TOKEN_WEIGHTS}") if f"{TOKEN_WEIGHTS}.idx" in arrays else None


def read_stored_weights(
    prefix: str | Path, arrays: Mapping[str, object], supervised: np.ndarray
) -> StoredWeights | None:
    """Read the weights of a data set's samples; ``None`` where all are 1.

    Args:
        prefix: of the data set.
        arrays: its files in the ledger, by suffix.
        supervised: int64 [samples], supervised targets of each.

    Raises:
        InputError: a file is missing or damaged.
    """
    samples, tokens = load_sample_weights(prefix, arrays), load_token_weights(prefix, arrays)
    if samples is None and tokens is None:
        return None
    sums = [supervised.astype(np.float64)]
    if tokens is not None:
        sums = [weight_sums(*tokens.read(first, first + _AT_ONCE)) for first in range(0, len(tokens), _AT_ONCE)]
    ones = np.ones(len(supervised), np.float32)
    return StoredWeights(ones if samples is None else np.array(samples), np.concatenate([np.zeros(0), *sums]), tokens)
