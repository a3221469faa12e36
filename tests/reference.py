"""Reference of the objective: docs/LOSSES.md in numpy, slow and obvious, fp64."""

import numpy as np


def reference_loss(mode, losses, weights, gamma=2.0):
    """Value of the objective ``--mft-loss mode``; focal-task is Eq. 3.

    Args:
        mode: name of the loss.
        losses: (task, [token losses]) of each sample of the whole global batch.
        weights: ``w_i`` of each task, or ``alpha_i`` of the focal losses.
        gamma: of the focal losses.
    """
    samples = [(task, np.asarray(tokens, np.float64)) for task, tokens in losses if len(tokens)]
    if mode == "token":
        return np.concatenate([tokens for _, tokens in samples]).mean()
    if mode == "sample":
        return np.mean([tokens.mean() for _, tokens in samples])
    present = sorted({task for task, _ in samples if weights[task] > 0})
    by_task = {task: [tokens for other, tokens in samples if other == task] for task in present}
    if mode == "task-token":
        means = {task: np.concatenate(of_task).mean() for task, of_task in by_task.items()}
    elif mode == "task-sample":
        means = {task: np.mean([tokens.mean() for tokens in of_task]) for task, of_task in by_task.items()}
    else:
        eq = focal_sample if mode == "focal-sample" else focal_task
        return sum(weights[task] * eq(of_task, gamma) for task, of_task in by_task.items()) / len(present)
    return sum(weights[task] * means[task] for task in present) / sum(weights[task] for task in present)


def focal_sample(samples, gamma):
    """Equation 2 for one task: (1 - P_j)^gamma Q_j, mean over its samples."""
    return np.mean([(1 - np.exp(-tokens).mean()) ** gamma * tokens.mean() for tokens in samples])


def focal_task(samples, gamma):
    """Equation 3 for one task: (1 - P_i)^gamma Q_i."""
    p = np.mean([np.exp(-tokens).mean() for tokens in samples])
    return (1 - p) ** gamma * np.mean([tokens.mean() for tokens in samples])


def reference_focal_surrogate(losses, alphas, gamma, detach, before):
    """Gradient of every token loss under focal-task, docs/LOSSES.md §3: the product rule at the earlier statistics.

    Args:
        losses: (task, [token losses]) of each sample.
        alphas: of each task.
        gamma: exponent.
        detach: whether the modulation is a constant.
        before: {task: (P, Q)} of earlier steps.

    Returns:
        an array of gradients for each sample.
    """
    samples = [(task, np.asarray(tokens, np.float64)) for task, tokens in losses]
    present = {task for task, tokens in samples if len(tokens) and alphas[task] > 0}
    count = {task: sum(1 for other, tokens in samples if other == task and len(tokens)) for task in present}
    gradients = []
    for task, tokens in samples:
        if task not in present or not len(tokens):
            gradients.append(np.zeros(len(tokens)))
            continue
        scale = alphas[task] / (len(present) * count[task] * len(tokens))
        if task not in before:
            gradients.append(np.full(len(tokens), scale))
            continue
        p, q = before[task]
        on_loss, on_probability = (1 - p) ** gamma, 0.0 if detach else -gamma * (1 - p) ** (gamma - 1) * q
        # d p_t / d l_t = -p_t
        gradients.append(scale * (on_loss - on_probability * np.exp(-tokens)))
    return gradients


def reference_weighted_loss(mode, samples, weights, gamma=2.0):
    """Value of the objective where samples and turns have weights, in Python's floats.

    Args:
        mode: name of the loss.
        samples: (task, [token losses], [weight of each token's turn], weight of the sample) of the global batch.
        weights: as of :func:`reference_loss`.
        gamma: of the focal losses.
    """
    samples = [sample for sample in samples if sample[1]]
    present = sorted({task for task, *_ in samples if weights[task] > 0})

    def mean(values_and_weights):
        total, divisor = 0.0, 0.0
        for value, weight in values_and_weights:
            total += weight * value
            divisor += weight
        return total / divisor

    def tokens(of_samples):
        return [
            (loss, of_sample * of_turn)
            for _, losses, turns, of_sample in of_samples
            for loss, of_turn in zip(losses, turns, strict=True)
        ]

    def of_sample(sample, function):
        return mean((function(loss), weight) for loss, weight in zip(sample[1], sample[2], strict=True))

    def by_samples(of_samples, function):
        return mean((function(sample), sample[3]) for sample in of_samples)

    def mean_loss(sample):
        return of_sample(sample, lambda loss: loss)

    def mean_miss(sample):
        return of_sample(sample, lambda loss: 1 - np.exp(-loss))

    if mode == "token":
        return mean(tokens(samples))
    if mode == "sample":
        return by_samples(samples, mean_loss)
    parts = []
    for task in present:
        here = [sample for sample in samples if sample[0] == task]
        if mode == "task-token":
            parts.append((mean(tokens(here)), weights[task]))
        elif mode == "task-sample":
            parts.append((by_samples(here, mean_loss), weights[task]))
        elif mode == "focal-sample":
            value = by_samples(here, lambda sample: mean_miss(sample) ** gamma * mean_loss(sample))
            parts.append((weights[task] * value, 1.0))
        else:
            value = by_samples(here, mean_miss) ** gamma * by_samples(here, mean_loss)
            parts.append((weights[task] * value, 1.0))
    return mean(parts)


def reference_epoch_loss(mode, samples, whole, weights, packs, packs_of_epoch):
    """Value of a step's objective with ``--mft-normalization epoch``, token by token.

    Args:
        mode: name of a linear loss.
        samples: of the step, as of :func:`reference_weighted_loss`.
        whole: of the whole epoch, the same.
        weights: ``w_i`` of each task.
        packs: of the step.
        packs_of_epoch: of the epoch.
    """
    tokens, count = {}, {}
    for task, losses, turns, of_sample in whole:
        if losses:
            tokens[task] = tokens.get(task, 0.0) + of_sample * sum(turns)
            count[task] = count.get(task, 0.0) + of_sample
    total = sum(weights[task] for task in tokens)
    value = 0.0
    for task, losses, turns, of_sample in samples:
        for loss, of_turn in zip(losses, turns, strict=True):
            c = of_sample * of_turn * packs_of_epoch / packs
            if mode in ("sample", "task-sample"):
                c /= sum(turns)
            if mode == "token":
                c /= sum(tokens.values())
            elif mode == "sample":
                c /= sum(count.values())
            else:
                c *= weights[task] / (total * (tokens if mode == "task-token" else count)[task])
            value += c * loss
    return value
