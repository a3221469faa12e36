"""Documents that are tokens already: an MMIDIDX index with its items, and MFTCoder's pair of tokens and loss masks."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mft_megatron.data.storage.indexed_dataset import IndexedDataset
from mft_megatron.data.storage.weights import SAMPLE_WEIGHTS, TOKEN_WEIGHTS
from mft_megatron.errors import InputError

from .record_batches import TokenizedBatch

# ends of the names of MFTCoder's pairs, before .idx and .bin
IDS, MASK = "_input_ids", "_loss_mask"
# sequences whose start is compared with the lengths at a time
_SEQUENCES_AT_ONCE = 1 << 20


def mask_index(path: Path) -> Path | None:
    """Path of the ``X_loss_mask.idx`` beside an ``X_input_ids.idx``; ``None`` where there is none."""
    if not path.name.endswith(f"{IDS}.idx"):
        return None
    mask = path.with_name(path.name.removesuffix(f"{IDS}.idx") + f"{MASK}.idx")
    return mask if mask.exists() else None


def files_on_disk(path: Path) -> list[Path]:
    """Files that are read for ``path``: itself, and for an ``.idx`` its ``.bin`` and the pair of its masks."""
    if path.suffix != ".idx":
        return [path]
    files = [path, path.with_suffix(".bin")]
    mask = mask_index(path)
    return [*files, mask, mask.with_suffix(".bin")] if mask else files


class TokenizedFile:
    """The documents of an MMIDIDX index; each is one sample, its sequences concatenated.

    An ``X_input_ids.idx`` that has an ``X_loss_mask.idx`` beside it takes its mask from there; the tokens of any other
    index are all supervised. Rows that were packed or padded when they were written stay as they are: padding has mask
    0, and the documents of a row are one sample.
    """

    def __init__(self, path: Path):
        """Open the index ``path`` and, where there is one, the index of its masks.

        Raises:
            InputError: a file is missing or damaged, items are no integers, the masks have other sequences, or there
                are weights.
        """
        self._path = path
        self._ids = _open_index(path)
        if not np.issubdtype(self._ids.items.dtype, np.integer):
            raise InputError(f"{path}: items of type {self._ids.items.dtype}; token ids are whole numbers")
        self._bounds = _document_bounds(self._ids, path)
        for suffix in (SAMPLE_WEIGHTS, f"{TOKEN_WEIGHTS}.idx"):
            weights = path.with_name(path.name.removesuffix(f"{IDS}.idx") + suffix)
            if path.name.endswith(f"{IDS}.idx") and weights.exists():
                raise InputError(
                    f"{weights}: holds weights of {path.name}, and tokens are read with weight 1; merge the data set "
                    "with tools/pack_data.py, or move the weights away"
                )
        self._mask: IndexedDataset | None = None
        self._mask_path = mask_index(path)
        if self._mask_path is not None:
            mask = _open_index(self._mask_path)
            same_lengths = np.array_equal(mask.lengths, self._ids.lengths)
            if not same_lengths or not np.array_equal(mask.documents, self._ids.documents):
                raise InputError(f"{self._mask_path}: its sequences are not those of {path.name}; write both again")
            _document_bounds(mask, self._mask_path)
            self._mask = mask

    def batches(self, batch_bytes: int) -> Iterator[TokenizedBatch]:
        """Read the documents in order, about ``batch_bytes`` of int32 ids at a time and at least one document.

        Raises:
            InputError: an id is negative or too large for int32, or a mask holds another value than 0 and 1.
        """
        first, documents = 0, len(self._bounds) - 1
        while first < documents:
            limit = self._bounds[first] + max(batch_bytes // 4, 1)
            last = int(np.searchsorted(self._bounds, limit, "right")) - 1
            last = min(max(last, first + 1), documents)
            items = slice(int(self._bounds[first]), int(self._bounds[last]))
            ids = self._checked_ids(self._ids.items[items])
            mask = np.ones(len(ids), np.uint8) if self._mask is None else self._checked_mask(self._mask.items[items])
            lengths = np.diff(self._bounds[first : last + 1]).astype(np.int32)
            yield TokenizedBatch(str(self._path), first + 1, ids, mask, lengths)
            first = last

    def _checked_ids(self, items: np.ndarray) -> np.ndarray:
        if len(items) and not 0 <= int(items.min()) <= int(items.max()) < 2**31:
            raise InputError(f"{self._path}: token ids from {items.min()} to {items.max()}; they must be 0 to 2^31 - 1")
        return items.astype(np.int32)

    def _checked_mask(self, items: np.ndarray) -> np.ndarray:
        mask = np.asarray(items == 1, np.uint8)
        if (mask != items).any():
            raise InputError(f"{self._mask_path}: a loss mask holds 0 and 1 only")
        return mask


def _open_index(path: Path) -> IndexedDataset:
    return IndexedDataset(path.with_suffix(""))


def _document_bounds(data: IndexedDataset, path: Path) -> np.ndarray:
    """Index of the first item of each document, then the number of items: int64 [documents + 1]."""
    sequences = len(data)
    starts = np.zeros(sequences + 1, np.int64)
    np.cumsum(data.lengths, dtype=np.int64, out=starts[1:])
    marks = data.documents
    whole = (
        (sequences == 0 or int(data.lengths.min()) >= 0)
        and starts[-1] == len(data.items)
        and all(
            np.array_equal(
                data.start_of(slice(first, first + _SEQUENCES_AT_ONCE)),
                starts[first : min(first + _SEQUENCES_AT_ONCE, sequences)],
            )
            for first in range(0, sequences, _SEQUENCES_AT_ONCE)
        )
        and len(marks) > 0
        and marks[0] == 0
        and marks[-1] == sequences
        and (np.diff(marks) >= 0).all()
    )
    if not whole:
        raise InputError(f"{path}: damaged, sequences or documents do not follow one after the other; write it again")
    return starts[marks]
