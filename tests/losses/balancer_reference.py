"""The balancers of docs/LOSSES.md §4 in numpy, slow and obvious, fp64.

Every function takes all draws so far and returns the weights after the last one. No state is carried from draw to draw,
unlike in the state machines that are tested against it.

Shape suffixes: T draws so far, S draws that gave a slope, K tasks.

    python tests/losses/balancer_reference.py

writes the golden files, tests/golden/balancer_*.txt, again.
"""

from functools import cache
from pathlib import Path

import numpy as np

EPS = 1e-8
GOLDEN_FOLDER = Path(__file__).parent.parent / "golden"


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def quotient(numerator, denominator):
    return numerator / denominator if denominator != 0 else np.zeros_like(numerator)


@cache
def pairs(points):
    first, second = np.triu_indices(points, 1)
    distance = (second - first).astype(float)
    return first, second, distance, max((distance**2).sum(), 1.0)


def slope(y_T):
    """The least-squares slope as the mean over all pairs of points of the pair's slope, weighted by distance squared.

    Equal to the centred formula, but with no centre: a flat curve gives exactly 0. One point gives 0 too.
    """
    first, second, distance, weight_sum = pairs(len(y_T))
    return distance @ (y_T[second] - y_T[first]) / weight_sum


def with_others(weights, took_part_K):
    """The weights of all tasks, from those of the tasks that took part."""
    weight_K = np.ones(len(took_part_K))
    if took_part_K.any():
        weight_K[took_part_K] = weights
        weight_K[~took_part_K] = np.mean(weights)
    return weight_K / weight_K.sum()


def uniform(tasks):
    return np.full(tasks, 1.0 / tasks), np.ones(tasks, bool)


def self_paced(loss_TK, *, history_length=100, scale_factor=50.0):
    if len(loss_TK) < history_length:
        return uniform(loss_TK.shape[1])
    window_TK = loss_TK[-history_length:]
    took_part_K = np.array([any(loss != curve[0] for loss in curve) for curve in window_TK.T])
    if not took_part_K.any():
        return with_others([], took_part_K), took_part_K
    a = slope(window_TK)[took_part_K]
    n = len(a) * quotient(a, np.abs(a).sum())
    score = softmax(n) * -n
    return with_others(softmax(scale_factor * score), took_part_K), took_part_K


def famo(loss_TK, *, lr=0.025, weight_decay=0.01, beta1=0.9, beta2=0.999, min_losses=None):
    draws, tasks = loss_TK.shape
    lowest_K = np.zeros(tasks) if min_losses is None else np.array(min_losses)
    D_TK = np.maximum(loss_TK - lowest_K, 0) + EPS
    xi_K = np.zeros(tasks)
    gradients = []
    for draw in range(1, draws):
        delta_K = np.log(D_TK[draw - 1]) - np.log(D_TK[draw])
        z_K = softmax(xi_K)
        jacobian_KK = np.diag(z_K) - np.outer(z_K, z_K)
        gradients.append(jacobian_KK.T @ delta_K + weight_decay * xi_K)
        # Adam with its bias correction is a weighted mean of all gradients, and of all their squares.
        age = np.arange(len(gradients))[::-1]
        mean_K = beta1**age @ np.array(gradients) / (beta1**age).sum()
        square_K = beta2**age @ np.square(gradients) / (beta2**age).sum()
        xi_K = xi_K - lr * mean_K / (np.sqrt(square_K) + 1e-8)
    weight_K = softmax(xi_K) / D_TK[-1]
    return weight_K / weight_K.sum(), np.ones(tasks, bool)


def coba(loss_TK, step_T, first_loss_K, *, warmup_steps=100, history_length=200, tau=5.0, variant="paper"):
    ratio_TK = loss_TK / first_loss_K
    windows = [
        ratio_TK[max(0, draw + 1 - history_length) : draw + 1]
        for draw, step in enumerate(step_T)
        if step >= warmup_steps
    ]
    if not windows:
        return uniform(len(first_loss_K))
    slope_SK = np.array([slope(window) for window in windows])

    def took_part(t):
        return (slope_SK[max(0, t - history_length) : t] != 0).any(axis=0)

    def largest_slope(s):
        """a_max(s). Where no task took part, every slope is 0, and so is the largest."""
        took_part_K = took_part(s)
        if not took_part_K.any():
            return 0.0
        if variant == "release":
            return slope(windows[s - 1][:, took_part_K].max(axis=1))
        return slope_SK[s - 1, took_part_K].max()

    t = len(windows)
    took_part_K = took_part(t)
    if not took_part_K.any():
        return with_others([], took_part_K), took_part_K
    a_S = slope_SK[:, took_part_K]
    tasks = a_S.shape[1]
    h = min(t, history_length)
    relative = softmax(tasks * quotient(a_S[-1], np.abs(a_S[-1]).sum()))
    absolute = softmax(np.array([-h * quotient(a[-1], np.abs(a[-h:]).sum()) for a in a_S.T]))
    largest_S = np.array([largest_slope(s) for s in range(1, t + 1)])
    divergence = t * softmax(-tau * t * quotient(largest_S, np.abs(largest_S).sum()))[-1]
    if variant == "paper":
        divergence = min(1.0, divergence)
    weights = divergence * relative + (1 - divergence) * absolute
    if variant == "release":
        weights = softmax(tasks * weights)
        m = 1 / (10 * tasks)
        if (weights < m).any():
            weights = weights * (1 - m * tasks) + m
    return with_others(weights, took_part_K), took_part_K


def reference(name, loss_TK, step_T, first_loss_K, **options):
    if name == "coba":
        return coba(loss_TK, step_T, first_loss_K, **options)
    return {"self-paced": self_paced, "famo": famo}[name](loss_TK, **options)


GOLDEN = {  # file: balancer, its options, steps between draws
    "balancer_self_paced.txt": ("self-paced", {"history_length": 12, "scale_factor": 10.0}, 1),
    "balancer_famo.txt": ("famo", {"min_losses": (0.0, 0.1, 0.5, 0.25)}, 2),
    "balancer_coba_paper.txt": ("coba", {"warmup_steps": 9, "history_length": 12}, 3),
    "balancer_coba_release.txt": ("coba", {"warmup_steps": 9, "history_length": 12, "variant": "release"}, 3),
}


def golden_losses(draws=50):
    """One task that converges quickly, one slowly, one that turns and diverges, one that moves only after draw 20."""
    rng = np.random.default_rng(20)
    k = np.arange(draws)
    loss_TK = np.stack(
        [
            0.4 + 1.6 * np.exp(-k / 8),
            1.0 + 1.5 * np.exp(-k / 60),
            0.7 + 0.9 * np.exp(-k / 10) + 0.02 * np.maximum(k - 25, 0),
            np.where(k < 20, 1.25, 1.25 * np.exp(-(k - 20) / 30)),
        ],
        axis=1,
    )
    loss_TK[:, :3] += rng.normal(0, 0.01, (draws, 3))
    return loss_TK.round(6)


def write_golden_files():
    loss_TK = golden_losses()
    first_loss_K = np.array([2.05, 2.4, 1.5, 1.25])
    for file, (name, options, interval) in GOLDEN.items():
        step_T = interval * np.arange(len(loss_TK))
        lines = [
            "# Made by `python tests/losses/balancer_reference.py`; the formulas are in docs/LOSSES.md, section 4.",
            f"# {name}, " + ", ".join(f"{option}={value}" for option, value in options.items()),
            "# One line per draw: the step, the loss of each task | the weight of each task after the draw.",
            "# The line that begins with `first` has the losses over the whole validation split.",
            "first " + " ".join(map(repr, first_loss_K.tolist())),
        ]
        for draw, step in enumerate(step_T):
            so_far = slice(draw + 1)
            weight_K, _ = reference(name, loss_TK[so_far], step_T[so_far], first_loss_K, **options)
            losses = " ".join(map(repr, loss_TK[draw].tolist()))
            lines.append(f"{step} {losses} | " + " ".join(f"{weight:.12e}" for weight in weight_K))
        (GOLDEN_FOLDER / file).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_golden_files()
