"""Stored samples made by hand: tokens and masks without text."""

from types import SimpleNamespace

import numpy as np

from mft_megatron.data.storage.ledger import TaskEntry
from mft_megatron.data.storage.stored_samples import StoredSamples


def entry(name, samples, tokens, supervised, documents=False, **given):
    settings = {"weight": None, "sampling": None, "overlong": None, **given}
    return TaskEntry(name, samples, samples, {}, tokens, supervised, documents, 0, {}, sources=[], **settings)


def stored_of(masks_of_tasks, **settings_of_tasks):
    """A store of one task for each item of ``masks_of_tasks`` (name → masks of its samples)."""
    masks = [np.array(mask, np.uint8) for own in masks_of_tasks.values() for mask in own]
    lengths = np.array([len(mask) for mask in masks], np.int32)
    supervised = np.array([int(mask[1:].sum()) for mask in masks], np.int64)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    numbers = [len(own) for own in masks_of_tasks.values()]
    task_ids = np.repeat(np.arange(len(numbers), dtype=np.uint16), numbers)
    tasks = []
    for number, (name, own) in enumerate(masks_of_tasks.items()):
        mine = task_ids == number
        documents = all(all(mask) for mask in own)
        totals = int(lengths[mine].sum()), int(supervised[mine].sum())
        tasks.append(entry(name, len(own), *totals, documents, **settings_of_tasks.get(name, {})))
    items = np.concatenate(masks) if masks else np.zeros(0, np.uint8)
    mask = SimpleNamespace(items=items, lengths=lengths, start_of=lambda samples: starts[samples])
    return StoredSamples(tasks, lengths, supervised, task_ids, mask)
