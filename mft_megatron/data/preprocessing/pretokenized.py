"""Documents that were tokenised by somebody else: taken over as they are, where they can be."""

import numpy as np

from mft_megatron.data.sample_slices import ranges, supervised_tokens
from mft_megatron.data.tasks.record_batches import TokenizedBatch
from mft_megatron.errors import InputError

from .encoding import Drop, EncodedBatch


def take_over(batch: TokenizedBatch, vocab_size: int) -> EncodedBatch:
    """The documents of a batch as samples; those without a target are dropped and counted.

    Raises:
        InputError: an id outside the vocabulary.
    """
    starts = np.cumsum(batch.lengths, dtype=np.int64) - batch.lengths
    strange = np.flatnonzero((batch.ids < 0) | (batch.ids >= vocab_size))
    if len(strange):
        number = batch.first_document + int(np.searchsorted(starts, strange[0], "right")) - 1
        raise InputError(
            f"{batch.path}: document {number}: id {batch.ids[strange[0]]}, and the tokenizer has {vocab_size}; give "
            "the --tokenizer-model the file was made with"
        )
    useful = supervised_tokens(batch.mask, batch.lengths) > 0
    kept = ranges(starts[useful], batch.lengths[useful])
    drops = [
        Drop(batch.path, batch.first_document + int(place), "no_supervised_token", "no supervised token in it")
        for place in np.flatnonzero(~useful)
    ]
    mask, lengths = batch.mask[kept], batch.lengths[useful]
    return EncodedBatch(
        ids=batch.ids[kept],
        mask=mask,
        lengths=lengths,
        records=len(batch.lengths),
        documents=int((supervised_tokens(mask, lengths) == lengths - 1).sum()),
        drops=drops,
    )
