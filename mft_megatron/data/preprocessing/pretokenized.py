"""Documents that are tokens already, as samples."""

import numpy as np

from mft_megatron.data.sample_slices import supervised_tokens
from mft_megatron.data.tasks.record_batches import TokenizedBatch
from mft_megatron.errors import InputError

from .batched_texts import TokenArrays
from .encoded_batch import EncodedBatch, drop_unsupervised


def samples_of(batch: TokenizedBatch, vocab_size: int) -> EncodedBatch:
    """Take the documents of a batch as samples of weight 1; those without a target are dropped and counted.

    Raises:
        InputError: an id is outside the vocabulary.
    """
    outside = np.flatnonzero((batch.ids < 0) | (batch.ids >= vocab_size))
    if len(outside):
        starts = np.cumsum(batch.lengths, dtype=np.int64) - batch.lengths
        document = batch.first_document + int(np.searchsorted(starts, outside[0], "right")) - 1
        raise InputError(
            f"{batch.path}: document {document}: id {batch.ids[outside[0]]}, and the tokenizer has {vocab_size}; give "
            "the --tokenizer-model the file was made with"
        )
    documents = range(batch.first_document, batch.first_document + len(batch.lengths))
    samples, _, drops = drop_unsupervised(
        TokenArrays(batch.ids, batch.mask, batch.lengths, None), batch.path, documents
    )
    ids, mask, lengths, _ = samples
    fully_supervised = int((supervised_tokens(mask, lengths) == lengths - 1).sum())
    return EncodedBatch(ids, mask, lengths, records=len(batch.lengths), documents=fully_supervised, drops=drops)
