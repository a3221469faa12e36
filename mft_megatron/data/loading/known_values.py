"""Check of each micro-batch that its values are ones that the model knows, before anything is computed with them.

With tensor parallelism an id beyond the vocabulary is masked like the ids of other ranks, so it would be trained on in
silence; without, it is an error of the device that names nothing.
"""

import numpy as np

from mft_megatron.data.sample_slices import SampleSlices
from mft_megatron.data.storage.checked_values import IDS, MASK, bad_value
from mft_megatron.errors import InputError

from .dataset import PackedDataset


def refuse_unknown_values(
    dataset: PackedDataset, slices: SampleSlices, tokens_T: np.ndarray, mask_T: np.ndarray
) -> None:
    """Check the tokens of some slices against the vocabulary, and their mask; one pass over each.

    Args:
        dataset: of the slices.
        slices: of the micro-batch.
        tokens_T: int64 [T], ids of all their tokens, concatenated.
        mask_T: uint8 [T], their mask.

    Raises:
        InputError: a value is none that the model knows; the message names file, sample, task and pack. It is for every
            rank that sees it, since others have other rows.
    """
    if not len(tokens_T):
        return
    vocabulary = dataset.vocab_size
    # a negative id is a huge one without its sign
    if tokens_T.view(np.uint64).max() >= vocabulary:
        position = int(np.flatnonzero((tokens_T < 0) | (tokens_T >= vocabulary))[0])
        raise _refusal(dataset, slices, position, IDS, int(tokens_T[position]), vocabulary)
    if mask_T.max() > 1:
        position = int(np.flatnonzero(mask_T > 1)[0])
        raise _refusal(dataset, slices, position, MASK, int(mask_T[position]), 2)


def _refusal(
    dataset: PackedDataset, slices: SampleSlices, position: int, suffix: str, value: int, limit: int
) -> InputError:
    ends = np.cumsum(slices.lengths)
    index = int(np.searchsorted(ends, position, "right"))
    sample = int(slices.samples[index])
    token = int(slices.starts[index]) + position - int(ends[index] - slices.lengths[index])
    packs = [
        f", pack {pack} of {name}" for name in dataset.splits for pack in dataset.split(name).packs_of(sample, token)
    ]
    number = int(dataset.task_ids[sample])
    task = dataset.tasks[number] if number < len(dataset.tasks) else f"number {number}"
    line = bad_value(dataset.prefix, suffix, sample, token, task, value, limit, "".join(packs[:1]))
    return InputError(line, always=True)
