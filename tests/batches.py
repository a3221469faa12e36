"""Micro-batches made by hand."""

import numpy as np
import torch

from mft_megatron.batch import Batch


def one_segment(tokens):
    """Make a micro-batch of one sample without padding; the label of each token is the next one, all are supervised."""
    tokens = np.asarray(tokens, np.int64).reshape(1, -1)
    zeros, positions = np.zeros_like(tokens), np.arange(tokens.size)[None]
    cu_seqlens = np.array([0, tokens.size], np.int32)
    labels, mask = np.roll(tokens, -1), np.ones(tokens.shape, np.uint8)
    return Batch(tokens, labels, mask, positions, zeros, zeros, cu_seqlens, tokens.size)


def random_batch(seed, tasks=4, rows=6, width=40):
    """Make rows of samples with uneven masks; one task is absent, and every fifth sample has no supervised token.

    Returns:
        sample ids int64, task ids int64, mask uint8 and token losses fp32, each [``rows``, ``width``].
    """
    rng = np.random.default_rng(seed)
    sample_ids = np.zeros((rows, width), np.int64)
    task_ids = np.zeros((rows, width), np.int64)
    mask = np.zeros((rows, width), np.uint8)
    number = 0
    for row in range(rows):
        position = 0
        while position < width:
            length = min(int(rng.integers(2, 15)), width - position)
            span = slice(position, position + length)
            sample_ids[row, span] = number
            task_ids[row, span] = rng.integers(0, tasks - 1)  # the last task never appears
            if number % 5 != 4:
                mask[row, span] = rng.random(length) < 0.7
            position += length
            number += 1
    return sample_ids, task_ids, mask, rng.uniform(0.1, 6.0, (rows, width)).astype(np.float32)


def by_sample(sample_ids, task_ids, mask, loss):
    """Task and supervised token losses of each sample."""
    return [
        (int(task_ids[sample_ids == s][0]), loss[(sample_ids == s) & (mask == 1)]) for s in range(sample_ids.max() + 1)
    ]


def counted(samples, tasks):
    """Supervised tokens and samples that have any of each task: int64 tensors [``tasks``] of :func:`by_sample`."""
    tokens_K = np.zeros(tasks, np.int64)
    samples_K = np.zeros(tasks, np.int64)
    for task, tokens in samples:
        tokens_K[task] += len(tokens)
        samples_K[task] += len(tokens) > 0
    return torch.from_numpy(tokens_K), torch.from_numpy(samples_K)


def random_weights(seed, sample_ids, mask, samples=True, turns=True):
    """Make weights of some turns, float32 [rows, width], 0 where the mask is, and of some samples.

    Both are 1 for some; ``None`` in place of one that is not asked for.
    """
    rng = np.random.default_rng([seed, 1])
    token_weights = np.where(rng.random(mask.shape) < 0.3, 1.0, rng.uniform(0.1, 3.0, mask.shape)) * mask
    of_sample = rng.choice([0.25, 1.0, 1.0, 2.5], sample_ids.max() + 1)
    return (
        token_weights.astype(np.float32) if turns else None,
        of_sample[sample_ids].astype(np.float32) if samples else None,
    )


def weighted_samples(sample_ids, task_ids, mask, loss, token_weights=None, sample_weights=None):
    """Task, supervised token losses, their weights, and the weight of each sample: lists of Python's floats."""
    ones = np.ones(mask.shape, np.float32)
    token_weights = ones if token_weights is None else token_weights
    sample_weights = ones if sample_weights is None else sample_weights
    samples = []
    for s in range(sample_ids.max() + 1):
        here = (sample_ids == s) & (mask == 1)
        tokens, weights = (array[here].astype(np.float64).tolist() for array in (loss, token_weights))
        of_sample = sample_ids == s
        samples.append((int(task_ids[of_sample][0]), tokens, weights, float(sample_weights[of_sample][0])))
    return samples


def weighed(samples, tasks):
    """``T_i`` and ``M_i``, fp64 tensors [``tasks``], of :func:`weighted_samples`."""
    tokens_K, samples_K = np.zeros(tasks), np.zeros(tasks)
    for task, tokens, weights, of_sample in samples:
        if tokens:
            tokens_K[task] += of_sample * sum(weights)
            samples_K[task] += of_sample
    return torch.from_numpy(tokens_K), torch.from_numpy(samples_K)


def as_batch(sample_ids, task_ids, mask, token_weights=None, sample_weights=None):
    """Make a micro-batch of tensors with the fields that the objective reads; the others are ``None``."""
    ids = (torch.from_numpy(array) for array in (mask, sample_ids, task_ids))
    weights = (None if array is None else torch.from_numpy(array) for array in (token_weights, sample_weights))
    mask_BS, sample_ids_BS, task_ids_BS = ids
    token_weights_BS, sample_weights_BS = weights
    cu_seqlens = torch.zeros(int(sample_ids.max()) + 2)
    return Batch(
        None,
        None,
        mask_BS,
        None,
        sample_ids_BS,
        task_ids_BS,
        cu_seqlens,
        0,
        token_weights_BS=token_weights_BS,
        sample_weights_BS=sample_weights_BS,
    )
