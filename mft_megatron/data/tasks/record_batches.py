"""What the readers of files hand to those who make samples: records to be encoded, or tokens as they lay there."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class RecordBatch:
    """Records of one file: ``lines[i]`` is line ``first_line + i``, counted from 1.

    A line is bytes as they stand in the file, its line end included; or a dict, one row of a parquet file.
    """

    path: str
    first_line: int
    lines: list[bytes | dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class TokenizedBatch:
    """Documents that are tokens already: ``ids`` int32 and ``mask`` uint8 (1: supervised) of all of them one behind the
    other, ``lengths`` int32 of each, 0 for an empty one. ``first``: number of the first one in its file, from 1."""

    path: str
    first: int
    ids: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
