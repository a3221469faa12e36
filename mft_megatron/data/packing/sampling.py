"""How often one pass over the training packs uses each sample: ``--task-sampling`` and its relatives.

A ratio is epochs of a task in one pass: 1 uses every sample once, 2 twice, 0.5 half of them once. What a ratio does not
divide evenly goes to the first samples of a named order, so counts are exact and depend on nothing but the seed.
"""

import numpy as np

from mft_megatron.data.permutation import named_permutation


def task_ratios(
    samples_K: np.ndarray,
    given: dict[int, float],
    temperature: float | None = None,
    max_epochs: float | None = None,
) -> np.ndarray:
    """Ratio of each task, float64 [K].

    Args:
        samples_K: int [K], training samples of each task.
        given: ratios by task number; they override the temperature.
        temperature: tasks get shares ∝ samples^(1/temperature) of as many samples as there are; 1 leaves all as they
            are, a large one makes them equal (multilingual BERT, T5).
        max_epochs: no task is used more often than this (T5's artificial limit, as epochs).
    """
    samples = samples_K.astype(np.float64)
    ratios = np.ones(len(samples))
    if temperature is not None:
        scaled = np.where(samples > 0, samples, 1.0) ** (1 / temperature) * (samples > 0)
        ratios = np.where(samples > 0, scaled / scaled.sum() * samples.sum() / np.maximum(samples, 1), 1.0)
    for task, ratio in given.items():
        ratios[task] = ratio
    return ratios if max_epochs is None else np.minimum(ratios, max_epochs)


def uses_of_samples(samples: int, ratio: float, epochs: int, name: str) -> np.ndarray:
    """How often each sample of a task is used in one pass of ``epochs`` epochs: int64 [samples].

    They add up to ``round(ratio · epochs · samples)``, at least one where the ratio is positive, and differ by one at
    most. ``name`` names the order in which samples get the extra use.
    """
    if samples == 0:
        return np.zeros(0, np.int64)
    total = max(round(ratio * epochs * samples), 1 if ratio > 0 else 0)
    each, rest = divmod(total, samples)
    uses = np.full(samples, each, np.int64)
    uses[named_permutation(name, samples)[:rest]] += 1
    return uses
