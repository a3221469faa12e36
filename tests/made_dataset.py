"""Data sets written without tokenising: the bytes of functions are the token ids."""

import numpy as np

from mft_megatron.data.loading.build_batch import build_batch
from mft_megatron.data.packing.build_packs import write_packs
from mft_megatron.data.packing.packing_options import PackingOptions
from mft_megatron.data.storage.dataset_writer import DatasetWriter
from mft_megatron.data.storage.ledger import Ledger, TokenizerEntry
from mft_megatron.data.storage.sample_writer import SampleWriter, TaskTally
from tests import source_code

VOCABULARY = 257  # all bytes, and padding
PLANTED = 200  # a byte that no function has
# interval at which each task takes functions
TASKS = {"completion": 1, "explain": 2, "write": 4, "read": 9}


def functions(longest):
    """Source code of functions with at most ``longest`` bytes."""
    return [text for text in source_code.functions(seed=8, count=194) if len(text.encode()) <= longest]


def write_dataset(
    prefix,
    seq_length,
    longest=None,
    documents=False,
    weights=None,
    tasks=TASKS,
    weighted="",
    seed=5,
    planted=None,
    garbled=None,
    **options,
):
    """Write the data set ``prefix`` and return its ledger.

    Samples are :func:`functions`; the second half of each is supervised, or all of it where they are ``documents``.

    Args:
        prefix: of the files.
        seq_length: tokens of a pack.
        longest: bytes of the longest function; ``seq_length`` by default.
        documents: whether samples are documents.
        weights: of tasks, by name.
        tasks: by name the interval at which a task takes functions: 1 takes all, 2 every other one.
        weighted: what has weights other than 1: "samples", "turns" (two in each sample), or both words.
        seed: of these weights.
        planted: task and number within it of the one sample whose third token is :data:`PLANTED`.
        garbled: task and number within it of the one sample whose tokens are random bytes above 127.
        options: of :class:`PackingOptions`.
    """
    weights, texts = weights or {}, functions(longest or seq_length)
    random = np.random.default_rng(seed)
    with DatasetWriter(prefix) as files:
        writer = SampleWriter(files, VOCABULARY)
        for name, interval in tasks.items():
            tally = TaskTally(name, {"template": "bytes"}, weights.get(name))
            writer.begin(tally)
            for number, text in enumerate(texts[::interval]):
                ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
                if planted == (name, number):
                    ids[2] = PLANTED
                if garbled == (name, number):
                    ids = np.random.default_rng(3).integers(128, 256, len(ids), dtype=np.int32)
                mask = (np.arange(len(ids)) >= (0 if documents else len(ids) // 2)).astype(np.uint8)
                sample_weights = token_weights = None
                if "samples" in weighted:
                    sample_weights = random.choice(np.array([0.1, 0.5, 1, 3], np.float32), 1)
                if "turns" in weighted:
                    turns = random.choice(np.array([0.3, 1, 2.5], np.float32), 2)
                    token_weights = mask * turns[(np.arange(len(ids)) > len(ids) * 3 // 4).astype(int)]
                writer.add(ids, mask, np.array([len(ids)], np.int32), token_weights, sample_weights)
                tally.samples_in += 1
                tally.documents += documents
        stored = writer.finish()
        entry, _ = write_packs(stored, PackingOptions(seq_length, **options), files)
        tokenizer = TokenizerEntry("HuggingFaceTokenizer", "bytes", "bytes", VOCABULARY, None, 10, VOCABULARY - 1)
        lengths = {str(seq_length): entry}
        ledger = Ledger(list(stored.tasks), tokenizer, {"stop_token_ids": [10]}, lengths, files.entries())
        files.publish(ledger)
    return ledger


def batch_of_packs(split, packs):
    """A micro-batch as numpy arrays, with a row for each index in ``packs``; -1 is an empty row."""
    return build_batch(split.dataset, [split.slices_of(pack) for pack in packs])
