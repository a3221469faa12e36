"""Made-up samples of unequal tasks, and how evenly packs spread them over the steps of an epoch."""

import numpy as np


def lognormal_tasks(samples_K, means_K, capacity, random):
    """Lengths int32 [samples] and tasks int32 [samples]; lengths are lognormal (sigma 0.6), 4 … ``capacity``."""
    means = np.repeat(means_K, samples_K)
    lengths = np.clip(random.lognormal(np.log(means) - 0.18, 0.6), 4, capacity)
    return lengths.astype(np.int32), np.repeat(np.arange(len(samples_K), dtype=np.int32), samples_K)


def five_tasks(samples, capacity=4096):
    """Five unequal tasks, of which one has 20 tokens a sample."""
    samples_K = np.array([195, 96, 33, 475, 41]) * samples // 840
    return lognormal_tasks(samples_K, [600, 300, 500, 250, 20], capacity, np.random.default_rng(0))


def zipf_tasks(samples, capacity=4096, tasks=100):
    """Tasks of which the k-th has 1/k of the first one's samples; mean lengths 50 … 1000."""
    random = np.random.default_rng(1)
    sizes = 1 / np.arange(1, tasks + 1)
    samples_K = np.maximum(samples * sizes / sizes.sum(), 1).astype(int)
    return lognormal_tasks(samples_K, np.exp(random.uniform(np.log(50), np.log(1000), tasks)), capacity, random)


def short_tasks(samples, capacity=4096):
    """35 tasks of mean lengths 60 … 900, but five of 5 … 15 tokens a sample."""
    random = np.random.default_rng(2)
    sizes = np.exp(random.uniform(np.log(1), np.log(20), 35))
    samples_K = (samples * sizes / sizes.sum()).astype(int)
    lengths, tasks = lognormal_tasks(samples_K, np.exp(random.uniform(np.log(60), np.log(900), 35)), capacity, random)
    return np.where(tasks < 5, random.integers(5, 16, len(tasks)), lengths).astype(np.int32), tasks


def long_samples(samples, capacity=4096):
    """Five tasks, every sample 0.25 … 0.45 of a pack."""
    random = np.random.default_rng(3)
    lengths = random.integers(capacity // 4 + 1, int(0.45 * capacity), samples)
    return lengths.astype(np.int32), np.sort(random.integers(0, 5, samples)).astype(np.int32)


def tokens_of_steps(lengths, tasks, packs, order, global_batch_size):
    """Tokens of each task in each whole step, float64 [steps, tasks].

    Args:
        lengths, tasks: int [samples].
        packs: indices of samples, and offsets of packs.
        order: int64 [packs].
        global_batch_size: packs of a step.
    """
    indices, offsets = packs
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    step = np.repeat(place // global_batch_size, np.diff(offsets))
    num_tasks = tasks.max() + 1
    cells = np.bincount(step * num_tasks + tasks[indices], lengths[indices])
    cells.resize((len(order) // global_batch_size + 1) * num_tasks)
    return cells.reshape(-1, num_tasks)[: len(order) // global_batch_size]


def variation(tokens_SK, lengths, tasks):
    """Coefficient of variation of each task's tokens over the steps, over that of random dealing: float64 [tasks].

    The coefficient of variation is the standard deviation over the steps divided by the mean. Random dealing sends each
    sample to one of the S steps, independently and uniformly; the expected variance over the steps is then
    ``Σ x² / S · (1 - 1 / S)`` for samples of x tokens, and the mean ``Σ x / S``.
    """
    steps, tokens = len(tokens_SK), lengths.astype(np.float64)
    dealt_K = np.sqrt((steps - 1) * np.bincount(tasks, tokens**2)) / np.bincount(tasks, tokens)
    return tokens_SK.std(0) / tokens_SK.mean(0) / dealt_K


def presence_of_random_dealing(tasks, steps):
    """Expected fraction of the steps that have a sample of each task under random dealing, float64 [tasks]."""
    return 1 - (1 - 1 / steps) ** np.bincount(tasks)
