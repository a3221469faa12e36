"""Stored samples made by hand: tokens and masks without text."""

from types import SimpleNamespace

import numpy as np

from mft_megatron.data.storage.ledger import TaskEntry
from mft_megatron.data.storage.stored_samples import StoredSamples


def entry(name, samples, tokens, supervised, documents=False, **settings):
    """Make the ledger's entry of a task; ``settings`` are those of a task file."""
    settings = {"weight": None, "sampling": None, "overlong": None, **settings}
    return TaskEntry(name, samples, samples, {}, tokens, supervised, documents, 0, {}, sources=[], **settings)


def stored_of(masks_of_tasks, **settings_of_tasks):
    """Make stored samples with one task for each item of ``masks_of_tasks``: name → masks of its samples."""
    masks = [np.array(mask, np.uint8) for task_masks in masks_of_tasks.values() for mask in task_masks]
    lengths = np.array([len(mask) for mask in masks], np.int32)
    supervised = np.array([int(mask[1:].sum()) for mask in masks], np.int64)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    counts = [len(task_masks) for task_masks in masks_of_tasks.values()]
    task_ids = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)
    tasks = []
    for index, (name, task_masks) in enumerate(masks_of_tasks.items()):
        in_task = task_ids == index
        documents = all(all(mask) for mask in task_masks)
        totals = int(lengths[in_task].sum()), int(supervised[in_task].sum())
        tasks.append(entry(name, len(task_masks), *totals, documents, **settings_of_tasks.get(name, {})))
    items = np.concatenate(masks) if masks else np.zeros(0, np.uint8)
    mask = SimpleNamespace(items=items, lengths=lengths, start_of=lambda samples: starts[samples])
    return StoredSamples(tasks, lengths, supervised, task_ids, mask)
