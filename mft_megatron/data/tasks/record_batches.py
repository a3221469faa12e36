"""Batches that a file of a task is read in: records to be encoded, or documents that are tokens already."""

import dataclasses
from typing import Any

import numpy as np


def position(path: str, number: int, of_array: bool) -> str:
    """Write the position of a record as messages show it.

    Args:
        path: of its file.
        number: its line, or its number in the array that the file is.
        of_array: the file is one JSON array.
    """
    return f"{path}: record {number}" if of_array else f"{path}:{number}"


@dataclasses.dataclass(frozen=True)
class RecordBatch:
    """Consecutive records of one file.

    Attributes:
        path: of the file.
        first_line: line of the first record, counted from 1.
        lines: the records; each is bytes as stored in the file, with the line end, or a dict, one row of a parquet
            file.
        of_array: the file is one JSON array, so records have numbers, not lines.
    """

    path: str
    first_line: int
    lines: list[bytes | dict[str, Any]]
    of_array: bool = False


@dataclasses.dataclass(frozen=True)
class TokenizedBatch:
    """Consecutive documents of one file that are tokens already.

    Attributes:
        path: of the file.
        first_document: position of the first document in the file, counted from 1.
        ids: int32, token ids of all these documents, concatenated.
        mask: uint8, 1 where a token of ``ids`` is supervised.
        lengths: int32 [documents], tokens of each; 0 for an empty one.
    """

    path: str
    first_document: int
    ids: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
