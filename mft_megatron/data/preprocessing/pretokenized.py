"""Documents that were tokenised by somebody else: taken over as they are, where they can be."""

import numpy as np

from mft_megatron.data.sample_slices import ranges, supervised_tokens
from mft_megatron.data.tasks.record_batches import TokenChunk
from mft_megatron.errors import InputError

from .encoding import Drop, EncodedChunk


def take_over(chunk: TokenChunk, vocab_size: int) -> EncodedChunk:
    """The documents of a chunk as samples; those without a target are dropped and counted.

    Raises:
        InputError: an id outside the vocabulary.
    """
    starts = np.cumsum(chunk.lengths, dtype=np.int64) - chunk.lengths
    strange = np.flatnonzero((chunk.ids < 0) | (chunk.ids >= vocab_size))
    if len(strange):
        number = chunk.first + int(np.searchsorted(starts, strange[0], "right")) - 1
        raise InputError(
            f"{chunk.path}: document {number}: id {chunk.ids[strange[0]]}, and the tokenizer has {vocab_size}; give "
            "the --tokenizer-model the file was made with"
        )
    useful = supervised_tokens(chunk.mask, chunk.lengths) > 0
    kept = ranges(starts[useful], chunk.lengths[useful])
    drops = [
        Drop(chunk.path, chunk.first + int(place), "no_supervised_token", "no supervised token in it")
        for place in np.flatnonzero(~useful)
    ]
    mask, lengths = chunk.mask[kept], chunk.lengths[useful]
    return EncodedChunk(
        ids=chunk.ids[kept],
        mask=mask,
        lengths=lengths,
        records=len(chunk.lengths),
        documents=int((supervised_tokens(mask, lengths) == lengths - 1).sum()),
        drops=drops,
    )
