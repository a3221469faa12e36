"""Sample slices to the arrays of a micro-batch, without a loop over tokens."""

import numpy as np

from mft_megatron.batch import Batch
from mft_megatron.data.sample_slices import concatenate_slices, ranges

from .dataset import PackedDataset, Rows
from .known_values import refuse_unknown_values


def build_batch(dataset: PackedDataset, rows: Rows, width: int | None = None) -> Batch[np.ndarray]:
    """Build a micro-batch: in each row its slices, concatenated, then padding.

    Labels are shifted here and nowhere else: the label of a position is the next token of the same segment, and it
    counts where that token is supervised. The last position of a segment has no label. A slice is a segment; in a
    joined data set all slices of a row are one.

    Args:
        dataset: of the samples.
        rows: B rows, whose slices have at most ``width`` tokens in total.
        width: positions of a row; by default the data set's sequence length.

    Raises:
        InputError: a token id is not in the vocabulary, or a mask is no mask.
    """
    tokens, num_rows = dataset.tokens, len(rows)
    width = dataset.seq_length if width is None else width
    slices = concatenate_slices(rows)
    row_of_slice = np.repeat(np.arange(num_rows), [len(row.samples) for row in rows])
    used_B = np.bincount(row_of_slice, weights=slices.lengths, minlength=num_rows).astype(np.int64)

    # index of the first token of each slice in the stream of rows; of each token in the data set and in the stream
    before = np.cumsum(slices.lengths) - slices.lengths
    slice_start = before + row_of_slice * width - (np.cumsum(used_B) - used_B)[row_of_slice]
    source = ranges(tokens.start_of(slices.samples) + slices.starts, slices.lengths)
    target = ranges(slice_start, slices.lengths)
    # index of the first token of each segment in the stream, and of its last among the tokens without padding
    filled = np.flatnonzero(used_B)
    segment_start = filled * width if dataset.joined else slice_start
    last = np.cumsum(used_B[filled] if dataset.joined else slices.lengths) - 1

    slice_tokens, slice_mask = tokens.items[source].astype(np.int64), dataset.mask.items[source]
    refuse_unknown_values(dataset, slices, slice_tokens, slice_mask)
    labels = np.append(slice_tokens[1:], 0)
    labels[last] = 0
    mask = np.append(slice_mask[1:], np.uint8(0))
    mask[last] = 0
    token_weights = sample_weights = None
    if dataset.token_weights is not None:
        token_weights = np.append(dataset.token_weights.items[source][1:], np.float32(0))
        token_weights[last] = 0
    if dataset.sample_weights is not None:
        sample_weights = np.repeat(dataset.sample_weights[slices.samples], slices.lengths)
    tasks = np.repeat(dataset.task_ids[slices.samples].astype(np.int64), slices.lengths)
    positions = num_rows * width

    # segments: those of the slices, and the padding of each row
    padded = np.flatnonzero(used_B < width)
    starts = np.sort(np.concatenate([segment_start, padded * width + used_B[padded]]))
    cu_seqlens = np.append(starts, positions)
    segment_lengths = np.diff(cu_seqlens)

    shape = num_rows, width
    return Batch(
        tokens_BS=_scattered(slice_tokens, target, np.full(positions, dataset.pad_token_id)).reshape(shape),
        labels_BS=_scattered(labels, target, np.zeros(positions, np.int64)).reshape(shape),
        loss_mask_BS=_scattered(mask, target, np.zeros(positions, np.uint8)).reshape(shape),
        position_ids_BS=(np.arange(positions) - np.repeat(starts, segment_lengths)).reshape(shape),
        sample_ids_BS=np.repeat(np.arange(len(starts)), segment_lengths).reshape(shape),
        task_ids_BS=_scattered(tasks, target, np.zeros(positions, np.int64)).reshape(shape),
        cu_seqlens=cu_seqlens.astype(np.int32),
        max_seqlen=int(segment_lengths.max()),
        lengths_B=used_B,
        token_weights_BS=_weights(token_weights, target, shape),
        sample_weights_BS=_weights(sample_weights, target, shape),
    )


def _weights(values: np.ndarray | None, indices: np.ndarray, shape: tuple[int, int]) -> np.ndarray | None:
    if values is None:
        return None
    return _scattered(values, indices, np.zeros(shape[0] * shape[1], np.float32)).reshape(shape)


def _scattered(values: np.ndarray, indices: np.ndarray, stream: np.ndarray) -> np.ndarray:
    stream[indices] = values
    return stream
