"""A data set of made-up samples: their lengths are drawn, their tokens are all the same.

It is written and packed like any other, so that everything that reads a data set runs as it does in training.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mft_megatron.arguments.values.mock_data import MockTask
from mft_megatron.data.packing.build_packs import write_packs
from mft_megatron.data.packing.packing_options import PackingOptions
from mft_megatron.data.sample_slices import ranges
from mft_megatron.data.storage.dataset_writer import DatasetWriter
from mft_megatron.data.storage.ledger import Ledger, TokenizerEntry
from mft_megatron.data.storage.sample_writer import SampleWriter, TaskTally
from mft_megatron.errors import InputError

# Twice as many training packs as validation packs; steps that need more packs than there are use them again.
SPLIT = (2.0, 1.0, 0.0)
MOST_TOKENS = 2**24
MOST_SAMPLES = 2**20
LEAST_PADDED = 2**12
_SEED = 1234


def write_mock_data(
    prefix: Path,
    tasks: Sequence[MockTask],
    seq_length: int,
    num_packs: int,
    vocab_size: int,
    padding_mode: str = "pack",
    supervised: float = 1.0,
) -> None:
    """Write a data set for ``seq_length`` with about ``num_packs`` training packs, and half as many for validation.

    Args:
        prefix: of its files.
        tasks: equally many samples are made of each, cut at ``seq_length``.
        seq_length: tokens of a pack.
        num_packs: training packs that are wanted; there are fewer where they would hold more than
            :data:`MOST_TOKENS` or :data:`MOST_SAMPLES`.
        vocab_size: of the tokenizer that the data set names.
        padding_mode: of :class:`PackingOptions`.
        supervised: fraction of each sample's tokens that are supervised, at the end; at least one is.

    Raises:
        InputError: two tasks have the same name.
    """
    names = task_names(tasks)
    lengths_K = _lengths(tasks, seq_length, num_packs, padding_mode)
    with DatasetWriter(prefix) as files:
        writer = SampleWriter(files, vocab_size)
        for name, lengths in zip(names, lengths_K, strict=True):
            tally = TaskTally(name, {"template": "mock data"})
            writer.begin(tally)
            ids, mask = np.zeros(int(lengths.sum()), np.int32), _mask(lengths, supervised)
            writer.add(ids, mask, lengths.astype(np.int32))
            tally.samples_in = len(lengths)
            tally.documents = len(lengths) if supervised == 1.0 else 0
        stored = writer.finish()
        options = PackingOptions(seq_length, SPLIT, _SEED, "truncate", padding_mode)
        entry, _ = write_packs(stored, options, files)
        tokenizer = TokenizerEntry("HuggingFaceTokenizer", "mock data", "mock data", vocab_size, None, 0, 0)
        ledger = Ledger(
            list(stored.tasks), tokenizer, {"stop_token_ids": [0]}, {str(seq_length): entry}, files.entries()
        )
        files.publish(ledger)


def task_names(tasks: Sequence[MockTask]) -> list[str]:
    """Names of the tasks; those without one are numbered.

    Raises:
        InputError: two tasks have the same name.
    """
    names = [task.name or f"task{number}" for number, task in enumerate(tasks, start=1)]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--mock-data {name}=…: two tasks have this name; give each task another one")
    return names


def _lengths(tasks: Sequence[MockTask], seq_length: int, num_packs: int, padding_mode: str) -> list[np.ndarray]:
    """Lengths of the samples of each task: int64 [samples] each, no longer than a pack."""
    random = np.random.default_rng(_SEED)
    mean = np.mean([task.lengths(1000, random).clip(max=seq_length).mean() for task in tasks])
    in_pack = 1.0 if padding_mode == "padding" else max(seq_length / mean, 1.0)
    fraction = SPLIT[0] / sum(SPLIT)
    # the longest rows of a step are those of a large data set
    packs = max(num_packs, LEAST_PADDED) if padding_mode == "padding" else max(num_packs, 2)
    samples = min(packs * in_pack / fraction, MOST_TOKENS / mean, MOST_SAMPLES)
    # Each split of each task has at least one.
    of_task = max(int(np.ceil(samples / len(tasks))), 4)
    return [task.lengths(of_task, random).clip(max=seq_length) for task in tasks]


def _mask(lengths: np.ndarray, supervised: float) -> np.ndarray:
    """Loss mask of concatenated samples: uint8 [tokens], 1 for the last part of each sample."""
    counted = np.clip(np.ceil(supervised * lengths), 1, lengths).astype(np.int64)
    mask = np.zeros(int(lengths.sum()), np.uint8)
    mask[ranges(np.cumsum(lengths) - counted, counted)] = 1
    return mask
