"""plot.png: validation curves of each task with their spread over seeds, epoch against global, weights of balancers."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from measurements import Run
from methods import BALANCED, BALANCERS, EPOCH_AGAINST, METHODS
from PIL import Image
from report import DECISIVE
from results import Comparison

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend is chosen

# Okabe and Ito's colours, which people with any colour vision can tell apart; markers and dashes say it again.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
MARKERS = "os^Dvp*"
DASHES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1)), (0, (5, 1)), "-")
SMOOTHED = 10  # steps
BESIDE = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0), "fontsize": 9, "frameon": False}
GROUPS = {"weights": "what counts the same", "samples": "by samples, focal", "balancers": "balancers"}


def plot(comparison: Comparison, path: Path) -> None:
    """Plot rows of panels by group of methods, columns by task; below them epoch minus global, and balancers' weights.

    ``global`` is the same black line in every row.
    """
    columns = (*comparison.tasks, "macro")
    figure = plt.figure(figsize=(16, 14), layout="constrained")
    curves, differences, weights = figure.subfigures(3, 1, height_ratios=[len(GROUPS), 0.9, 1.1])
    axes = curves.subplots(len(GROUPS), len(columns), sharex=True, sharey="col")
    for (group, title), axes_of_row in zip(GROUPS.items(), axes, strict=True):
        methods = [BALANCED, *(name for name, method in METHODS.items() if method.group == group and name != BALANCED)]
        for column, panel in zip(columns, axes_of_row, strict=True):
            for index, method in enumerate(methods):
                _curve(panel, comparison.runs[method], column, method, index)
        axes_of_row[0].set_ylabel(f"{title}\nvalidation loss")
        axes_of_row[-1].legend(**BESIDE)
    for column, panel in zip(columns, axes[0], strict=True):
        panel.set_title(column, fontsize=10)
    for panel in axes[-1]:
        panel.set_xlabel("step")
    _plot_differences(differences, comparison)
    _plot_weights(weights, comparison)
    image = BytesIO()
    figure.savefig(image, dpi=80)
    plt.close(figure)
    Image.open(image).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(path, format="PNG", optimize=True)


def _curve(panel: plt.Axes, runs: Sequence[Run], column: str, label: str, index: int) -> None:
    """Plot the mean over seeds and a band of one standard deviation."""
    value_NE = np.array([[columns[column] for columns in run.columns_E] for run in runs])
    step_E, mean_E = runs[0].eval_step_E, value_NE.mean(0)
    std_E = value_NE.std(0, ddof=1) if len(runs) > 1 else np.zeros_like(mean_E)
    style = {"color": COLOURS[index], "marker": MARKERS[index], "linestyle": DASHES[index]}
    panel.plot(step_E, mean_E, markersize=4, linewidth=1.3, label=label, **style)
    panel.fill_between(step_E, mean_E - std_E, mean_E + std_E, color=COLOURS[index], alpha=0.2, linewidth=0)
    panel.set_xticks(step_E)
    panel.grid(alpha=0.25)


def _plot_differences(figure: matplotlib.figure.SubFigure, comparison: Comparison) -> None:
    """Plot each seed's difference, and their mean with its 95 % interval."""
    axes = figure.subplots(1, len(DECISIVE), sharey=True)
    for column, panel in zip(DECISIVE, axes, strict=True):
        for row, (method, other) in enumerate(EPOCH_AGAINST.items()):
            difference = comparison.paired(method, other, column)
            values = zip(comparison.values(method, column), comparison.values(other, column), strict=True)
            seeds = [value - reference for value, reference in values]
            panel.plot(seeds, [row] * len(seeds), "|", color=COLOURS[2], markersize=8)
            panel.errorbar(difference.mean, row, xerr=difference.half_width, fmt="o", color=COLOURS[0], capsize=3)
        panel.axvline(0, color="grey", linewidth=0.8)
        panel.set_title(column, fontsize=10)
        panel.grid(alpha=0.25)
    axes[0].set_yticks(range(len(EPOCH_AGAINST)), [f"{method} − {other}" for method, other in EPOCH_AGAINST.items()])
    axes[0].invert_yaxis()
    figure.supxlabel("difference of losses: seeds, mean, 95 % interval", fontsize=9)


def _plot_weights(figure: matplotlib.figure.SubFigure, comparison: Comparison) -> None:
    axes = figure.subplots(1, len(BALANCERS), sharex=True, sharey=True)
    for method, panel in zip(BALANCERS, axes, strict=True):
        weight_NTK = np.array([run.weight_TK for run in comparison.runs[method]])
        step_T = np.arange(1, weight_NTK.shape[1] + 1)
        for i, task in enumerate(comparison.tasks):
            weight_NT, colour = weight_NTK[..., i], COLOURS[i + 1]
            mean_T = _running_mean(weight_NT.mean(0), SMOOTHED)
            panel.plot(step_T, mean_T, color=colour, linestyle=DASHES[i], linewidth=1.5, label=task)
            panel.fill_between(step_T, weight_NT.min(0), weight_NT.max(0), color=colour, alpha=0.15, linewidth=0)
        panel.set_title(f"{method}: weights, mean of seeds over {SMOOTHED} steps and range", fontsize=10)
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
    axes[0].set_ylabel("part of all weights")
    axes[-1].legend(**BESIDE)


def _running_mean(value_T: np.ndarray, steps: int) -> np.ndarray:
    """Mean of the last ``steps`` values, fewer at the beginning; fp64 [T]."""
    total_T = np.cumsum(value_T)
    total_T[steps:] = total_T[steps:] - total_T[:-steps]
    return total_T / np.minimum(np.arange(1, len(value_T) + 1), steps)
