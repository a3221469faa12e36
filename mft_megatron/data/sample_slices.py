"""Pieces: what rows are made of. A piece is a sample, or a part of one where the sample is longer than a row."""

from typing import NamedTuple

import numpy as np


class Pieces(NamedTuple):
    """Parallel arrays of P pieces: ``samples`` int64 numbers of samples; ``starts`` int64, first token within the
    sample; ``lengths`` int64, tokens."""

    samples: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def take(self, places: np.ndarray | slice) -> "Pieces":
        """Some of the pieces, in the order of ``places``."""
        return Pieces(*(values[places] for values in self))

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())


NO_PIECES = Pieces(*(np.zeros(0, np.int64) for _ in Pieces._fields))


def join(parts: list[Pieces]) -> Pieces:
    """All pieces of ``parts``, one behind the other."""
    return Pieces(*map(np.concatenate, zip(*parts, strict=True))) if parts else NO_PIECES


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, … for every start, ``length`` of them each, one range behind the other; int64."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def supervised_tokens(mask: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Targets that count in each sample or piece, int64: supervised tokens but the first, which nothing predicts.

    ``mask`` uint8 of all of them one behind the other, ``lengths`` of each; 0 for an empty one.
    """
    targets, some = np.zeros(len(lengths), np.int64), lengths > 0
    starts = (np.cumsum(lengths, dtype=np.int64) - lengths)[some]
    if len(starts):
        targets[some] = np.add.reduceat(mask, starts, dtype=np.int64) - mask[starts]
    return targets
