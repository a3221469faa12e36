"""Number of times that one pass over the training packs uses each sample: ``--task-sampling`` and related options.

A ratio is epochs of a task in one pass: 1 uses every sample once, 2 twice, 0.5 half of them once. Where a ratio does
not divide evenly, the first samples of a named permutation get one more use, so counts are exact and depend on nothing
but the seed.
"""

from collections.abc import Mapping

import numpy as np

from mft_megatron.data.permutation import named_permutation


def task_ratios(
    samples_K: np.ndarray,
    given: Mapping[int, float],
    temperature: float | None = None,
    max_epochs: float | None = None,
) -> np.ndarray:
    """Ratio of each task, float64 [K].

    Args:
        samples_K: int [K], training samples of each task.
        given: ratios by index of the task; they override the temperature.
        temperature: tasks get parts ∝ samples^(1/temperature) of the total number of samples; 1 leaves all ratios at 1,
            a large one makes the parts equal (multilingual BERT, T5).
        max_epochs: upper limit of every ratio (T5's artificial limit, as epochs).
    """
    samples = samples_K.astype(np.float64)
    ratios = np.ones(len(samples))
    if temperature is not None:
        scaled = np.where(samples > 0, samples, 1.0) ** (1 / temperature) * (samples > 0)
        ratios = np.where(samples > 0, scaled / scaled.sum() * samples.sum() / np.maximum(samples, 1), 1.0)
    for task, ratio in given.items():
        ratios[task] = ratio
    return ratios if max_epochs is None else np.minimum(ratios, max_epochs)


def uses_of_samples(num_samples: int, ratio: float, epochs: int, name: str) -> np.ndarray:
    """Number of uses of each sample of a task in one pass of ``epochs`` epochs: int64 [``num_samples``].

    Their sum is ``round(ratio · epochs · num_samples)``, at least one where the ratio is positive; they differ by one
    at most. ``name`` names the permutation whose first samples get one more use.
    """
    if num_samples == 0:
        return np.zeros(0, np.int64)
    total = max(round(ratio * epochs * num_samples), 1 if ratio > 0 else 0)
    each, rest = divmod(total, num_samples)
    uses = np.full(num_samples, each, np.int64)
    uses[named_permutation(name, num_samples)[:rest]] += 1
    return uses
