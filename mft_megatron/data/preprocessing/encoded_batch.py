"""The samples of a batch of records or documents, and the records that are left out."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mft_megatron.data.records.notes import RecordNotes
from mft_megatron.data.sample_slices import supervised_tokens
from mft_megatron.data.tasks.record_batches import position

from .batched_texts import TokenArrays


@dataclasses.dataclass(frozen=True)
class Drop:
    """A record that is left out.

    Attributes:
        path: of its file.
        line: of the record, counted from 1.
        reason: name it is counted under in the ledger.
        message: explanation for the user.
        of_array: the line is the number of a record of a JSON array.
    """

    path: str
    line: int
    reason: str
    message: str
    of_array: bool = False

    @property
    def position(self) -> str:
        """Position of the record as messages show it."""
        return position(self.path, self.line, self.of_array)


@dataclasses.dataclass
class EncodedBatch:
    """Samples of a batch, in order, whole however long they are.

    Attributes:
        ids: int32, token ids of all samples, concatenated.
        mask: uint8, 1 where a token of ``ids`` is supervised.
        lengths: int32 [samples], tokens of each, at least 2.
        records: number of records that were read; blank lines are none.
        documents: number of samples made from ``text`` records.
        drops: records that are left out.
        filled: number of samples written as fill-in-the-middle.
        notes: what the user should know about the records that are used.
        chats: number of samples written with the chat format.
        examples: of :mod:`mft_megatron.data.chat_templates.examples`; ``sample`` is the index in the batch.
        added: number of samples beyond one a record, before any was dropped.
        token_weights: float32, of each token of ``ids``; ``None`` where all are 0 or 1, as the mask is.
        sample_weights: float32 [samples]; ``None`` where all are 1.
    """

    ids: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    records: int
    documents: int
    drops: list[Drop]
    filled: int = 0
    notes: RecordNotes = dataclasses.field(default_factory=RecordNotes)
    chats: int = 0
    examples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    added: int = 0
    token_weights: np.ndarray | None = None
    sample_weights: np.ndarray | None = None


def drop_unsupervised(
    samples: TokenArrays, path: str, lines: Sequence[int] | range, of_array: bool = False
) -> tuple[TokenArrays, np.ndarray, list[Drop]]:
    """Leave out the samples that have no supervised target.

    Args:
        samples: of a batch.
        path: of the file they were read from.
        lines: line of each sample in the file.
        of_array: as in :class:`Drop`.

    Returns:
        samples: those that are kept.
        kept: bool [samples].
        drops: one for each sample that is left out.
    """
    ids, mask, lengths, weights = samples
    kept = supervised_tokens(mask, lengths) > 0
    drops = [
        Drop(path, lines[index], "no_supervised_token", "no supervised token in it", of_array)
        for index in np.flatnonzero(~kept).tolist()
    ]
    if drops:
        tokens_kept = np.repeat(kept, lengths)
        weights = None if weights is None else weights[tokens_kept]
        samples = TokenArrays(ids[tokens_kept], mask[tokens_kept], lengths[kept], weights)
    return samples, kept, drops
