"""The objective by the book: docs/LOSSES.md written out in numpy, slow and obvious, fp64."""

import numpy as np


def reference_loss(mode, losses, weights, gamma=2.0):
    """The objective by the book. ``losses``: one (task, [token losses]) per sample of the whole global batch.

    ``weights``: ``w_i``, or ``alpha_i`` of the focal losses. focal-task is Eq. 3 itself.
    """
    samples = [(task, np.asarray(tokens, np.float64)) for task, tokens in losses if len(tokens)]
    if mode == "token":
        return np.concatenate([tokens for _, tokens in samples]).mean()
    if mode == "sample":
        return np.mean([tokens.mean() for _, tokens in samples])
    present = sorted({task for task, _ in samples if weights[task] > 0})
    by_task = {task: [tokens for other, tokens in samples if other == task] for task in present}
    if mode == "task-token":
        means = {task: np.concatenate(own).mean() for task, own in by_task.items()}
    elif mode == "task-sample":
        means = {task: np.mean([tokens.mean() for tokens in own]) for task, own in by_task.items()}
    else:
        eq = focal_sample if mode == "focal-sample" else focal_task
        return sum(weights[task] * eq(own, gamma) for task, own in by_task.items()) / len(present)
    return sum(weights[task] * means[task] for task in present) / sum(weights[task] for task in present)


def focal_sample(samples, gamma):
    """Eq. 2 of one task: (1 - P_j)^gamma Q_j, mean over its samples."""
    return np.mean([(1 - np.exp(-tokens).mean()) ** gamma * tokens.mean() for tokens in samples])


def focal_task(samples, gamma):
    """Eq. 3 of one task: (1 - P_i)^gamma Q_i."""
    p = np.mean([np.exp(-tokens).mean() for tokens in samples])
    return (1 - p) ** gamma * np.mean([tokens.mean() for tokens in samples])


def reference_focal_surrogate(losses, alphas, gamma, detach, before):
    """Gradient of every token loss under focal-task, by docs/LOSSES.md §3: the product rule at the statistics before.

    ``before``: {task: (P, Q)} of earlier steps. Returns one array of gradients per sample of ``losses``.
    """
    samples = [(task, np.asarray(tokens, np.float64)) for task, tokens in losses]
    present = {task for task, tokens in samples if len(tokens) and alphas[task] > 0}
    number = {task: sum(1 for other, tokens in samples if other == task and len(tokens)) for task in present}
    gradients = []
    for task, tokens in samples:
        if task not in present or not len(tokens):
            gradients.append(np.zeros(len(tokens)))
            continue
        scale = alphas[task] / (len(present) * number[task] * len(tokens))
        if task not in before:
            gradients.append(np.full(len(tokens), scale))
            continue
        p, q = before[task]
        on_loss, on_probability = (1 - p) ** gamma, 0.0 if detach else -gamma * (1 - p) ** (gamma - 1) * q
        # d p_t / d l_t = -p_t
        gradients.append(scale * (on_loss - on_probability * np.exp(-tokens)))
    return gradients
