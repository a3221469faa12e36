"""The objective by the book: docs/LOSSES.md written out in numpy, slow and obvious, fp64."""

import numpy as np


def reference_loss(mode, losses, weights):
    """The objective by the book. ``losses``: one (task, [token losses]) per sample of the whole global batch."""
    samples = [(task, np.asarray(tokens, np.float64)) for task, tokens in losses if len(tokens)]
    if mode == "token":
        return np.concatenate([tokens for _, tokens in samples]).mean()
    if mode == "sample":
        return np.mean([tokens.mean() for _, tokens in samples])
    total = weight_sum = 0.0
    for task in sorted({task for task, _ in samples}):
        own = [tokens for other, tokens in samples if other == task]
        if weights[task] > 0:
            mean = np.concatenate(own).mean() if mode == "task-token" else np.mean([tokens.mean() for tokens in own])
            total += weights[task] * mean
            weight_sum += weights[task]
    return total / weight_sum
