"""Values of a data set's files that training could not use: ids beyond the vocabulary, marks that are no marks.

Hashes show that a file is the one that its ledger was written for; a ledger that was rewritten together with its files
is trusted no more than they are.
"""

from pathlib import Path

import numpy as np

from mft_megatron.errors import InputError

from .arrays import load_task_ids
from .indexed_dataset import IndexedDataset
from .ledger import Ledger, ledger_path
from .weights import SAMPLE_WEIGHTS, TOKEN_WEIGHTS, load_sample_weights, load_token_weights

REMEDY = "the data set was changed after it was made; preprocess the data again"
IDS, MASK = "_input_ids.bin", "_loss_mask.bin"
# elements that are in memory at a time
_AT_ONCE = 1 << 20


def refuse_bad_values(prefix: str | Path, ledger: Ledger) -> None:
    """Read all values of a data set's samples, and check that training could use them.

    Raises:
        InputError: a token id is not in the vocabulary, a mask is neither 0 nor 1, a sample is of no task, or a weight
            is negative or not finite; the message names file, sample and task. Or a file is missing or damaged.
    """
    names = [task.name for task in ledger.tasks]
    tokens, mask = IndexedDataset(f"{prefix}_input_ids"), IndexedDataset(f"{prefix}_loss_mask")
    task_ids = load_task_ids(prefix)
    if not 0 <= ledger.tokenizer.pad_token_id < ledger.tokenizer.vocab_size:
        raise InputError(
            f"{ledger_path(prefix)}: pad_token_id {ledger.tokenizer.pad_token_id} is not in the vocabulary of "
            f"{ledger.tokenizer.vocab_size}; {REMEDY}"
        )
    sample = first_outside(task_ids, len(names))
    if sample is not None:
        raise InputError(
            f"{prefix}_task_ids.npy: sample {sample} is of task number {task_ids[sample]}, and the ledger has "
            f"{len(names)} tasks; {REMEDY}"
        )
    for data, suffix, limit in ((tokens, IDS, ledger.tokenizer.vocab_size), (mask, MASK, 2)):
        item = first_outside(data.items, limit)
        if item is not None:
            sample, token = _sample_of(data, item)
            task = names[task_ids[sample]]
            raise InputError(bad_value(prefix, suffix, sample, token, task, int(data.items[item]), limit))
    for suffix, weights in (
        (f"{SAMPLE_WEIGHTS}", load_sample_weights(prefix, ledger.arrays)),
        (f"{TOKEN_WEIGHTS}.bin", getattr(load_token_weights(prefix, ledger.arrays), "items", None)),
    ):
        index = None if weights is None else _first_bad_weight(weights)
        if weights is not None and index is not None:
            raise InputError(f"{prefix}{suffix}: weight {index} is {weights[index]:g}; {REMEDY}")


def bad_value(
    prefix: str | Path, suffix: str, sample: int, token: int, task: str, value: int, limit: int, where: str = ""
) -> str:
    """Say in a line what is wrong with an item of a sample.

    Args:
        prefix: of the data set.
        suffix: of the file, :data:`IDS` or :data:`MASK`.
        sample: index of the sample.
        token: index within the sample.
        task: name of the sample's task.
        value: of the item.
        limit: allowed are the values below.
        where: in which pack it is, after a comma, if that is known.
    """
    allowed = f"the vocabulary has {limit}" if suffix == IDS else "a mask is 0 or 1"
    what = "token" if suffix == IDS else "mask of token"
    return f"{prefix}{suffix}: {what} {token} of sample {sample} (task {task}{where}) is {value}, {allowed}; {REMEDY}"


def first_outside(values: np.ndarray, limit: int) -> int | None:
    """Index of the first of some integers, of any shape [n], that is not in 0 … ``limit - 1``; ``None`` without one."""
    if not len(values) or (np.iinfo(values.dtype).max < limit and np.iinfo(values.dtype).min == 0):
        return None
    for first in range(0, len(values), _AT_ONCE):
        block = values[first : first + _AT_ONCE]
        if block.max() >= limit or block.min() < 0:
            return first + int(np.flatnonzero((block >= limit) | (block < 0))[0])
    return None


def _first_bad_weight(weights: np.ndarray) -> int | None:
    for first in range(0, len(weights), _AT_ONCE):
        block = np.asarray(weights[first : first + _AT_ONCE])
        if not block.min() >= 0 or not np.isfinite(block.max()):
            return first + int(np.flatnonzero(~(np.isfinite(block) & (block >= 0)))[0])
    return None


def _sample_of(data: IndexedDataset, item: int) -> tuple[int, int]:
    """The sample that an item of the concatenated samples is in, and its index in the sample."""
    starts = data.start_of(slice(None))
    sample = int(np.searchsorted(starts, item, "right")) - 1
    return sample, item - int(starts[sample])
