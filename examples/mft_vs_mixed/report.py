"""table.md and results.json of a comparison of all methods."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from measurements import PROBED, SUMMARIES, TRAIN_MACRO, TRAIN_RAREST, UNSEEN
from methods import BALANCERS, BASE_MODEL, COMPARED, EPOCH_AGAINST, METHODS
from results import Comparison, Difference
from samples import RAREST

DECISIVE = (TRAIN_MACRO, "macro", TRAIN_RAREST, RAREST, "by tokens", UNSEEN)
SIZES = ("global", "small global")  # one method for each number of rows in a step
MISSING = "–"


def table(comparison: Comparison, seeds: Sequence[int], iterations: int) -> str:
    """All tables, as Markdown."""
    count = len(seeds)
    columns = (*comparison.tasks, *SUMMARIES)
    presence = {method: comparison.presence(method) for method in SIZES}
    share = {method: (comparison.mean_share(method), comparison.run_share(method)) for method in METHODS}
    weight = {method: comparison.last_weight(method) for method in BALANCERS}
    time = {method: _time_of_draws(comparison, method) for method in BALANCERS}
    others = [name for name in comparison.models if name != BASE_MODEL]
    parts = [
        "`epoch` minus `global` with the same seed: mean ± standard error and Student's 95 % interval, "
        f"{count} seeds. In bold: 0 is outside the interval.",
        _markdown(
            EPOCH_AGAINST,
            DECISIVE,
            lambda method, column: _interval(comparison.paired(method, EPOCH_AGAINST[method], column)),
        ),
        f"Validation losses after {iterations} steps, or as many rows in smaller steps, mean ± standard deviation over "
        f"seeds {', '.join(map(str, seeds))}.",
        _markdown([*METHODS, *others], columns, _spread(comparison)),
    ]
    for other, methods in COMPARED.items():
        parts += [
            f"Final loss minus that of `{other}` with the same seed: mean ± standard error. In bold: 0 is outside the "
            f"95 % interval (Student's t, {count} seeds).",
            _markdown(methods, columns, _differences(comparison, other)),
        ]
    probed = [name for name in comparison.names if comparison.has(name, UNSEEN)]
    parts += [
        "Final models on the training samples (Eq. 1, and its term of the rarest task) and on the unseen task, mean ± "
        "standard deviation.",
        _markdown(probed, PROBED, _spread(comparison)),
        "Loss of the unseen task minus that of another model with the same seed.",
        _markdown(
            [name for name in probed if name not in METHODS or METHODS[name].from_base],
            (BASE_MODEL, "mixture"),
            lambda method, other: _signed(comparison.paired(method, other, UNSEEN)) if method != other else MISSING,
        ),
        f"Steps whose gradient was clipped, of those with and of those without a sample of {RAREST}.",
        _markdown(
            [method for pair in EPOCH_AGAINST.items() for method in reversed(pair)],
            ("with", "without"),
            lambda method, column: f"{comparison.clipped(method, RAREST, column == 'with'):.1%}",
        ),
        "Steps that have a sample of the task; the same for all methods with as many rows in a step.",
        _markdown(SIZES, comparison.tasks, lambda method, task: f"{presence[method][task]:.1%}"),
        "Realised share of the objective: mean over the steps, 0 in one that has none of the task / of the whole run.",
        _markdown(
            METHODS, comparison.tasks, lambda method, task: " / ".join(f"{part[task]:.1%}" for part in share[method])
        ),
        "Weights over the last tenth of the steps, and the part of a step's time that the draws take.",
        _markdown(
            BALANCERS,
            (*comparison.tasks, "time of draws"),
            lambda method, column: f"{weight[method].get(column, time[method]):.1%}",
        ),
    ]
    return "\n\n".join(parts) + "\n"


def as_json(comparison: Comparison, seeds: Sequence[int], settings: dict[str, Any]) -> dict[str, Any]:
    """Every number of the tables, and every evaluation of every run."""
    methods: dict[str, dict[str, Any]] = {}
    for method in comparison.names:
        measured = [name for name in (*comparison.tasks, *SUMMARIES, *PROBED) if comparison.has(method, name)]
        methods[method] = {
            "final": {column: dataclasses.asdict(comparison.spread(method, column)) for column in measured},
            "of seeds": {
                str(seed): {column: comparison.values(method, column)[i] for column in measured}
                for i, seed in enumerate(seeds)
            },
        }
    for method, runs in comparison.runs.items():
        methods[method] |= {
            "options": METHODS[method].options,
            "runs": {
                str(seed): [
                    {"step": int(step), **values} for step, values in zip(run.eval_step_E, run.columns_E, strict=True)
                ]
                for seed, run in zip(seeds, runs, strict=True)
            },
            "presence": comparison.presence(method),
            "share of steps": comparison.mean_share(method),
            "share of the run": comparison.run_share(method),
            "last weight": comparison.last_weight(method),
            "time of draws": _time_of_draws(comparison, method),
            "clipped": {
                "with the rarest task": comparison.clipped(method, RAREST, True),
                "without": comparison.clipped(method, RAREST, False),
            },
        }
    compared = [(method, other) for other, methods_ in COMPARED.items() for method in methods_]
    for method, other in [*EPOCH_AGAINST.items(), *compared]:
        methods[method][f"minus {other}"] = {
            column: dataclasses.asdict(comparison.paired(method, other, column))
            for column in methods[method]["final"]
            if comparison.has(other, column)
        }
    return {"settings": settings, "tasks": list(comparison.tasks), "methods": methods}


def _spread(comparison: Comparison) -> Callable[[str, str], str]:
    def cell(method: str, column: str) -> str:
        value = comparison.spread(method, column)
        return f"{value.mean:.3f}" if value.std is None else f"{value.mean:.3f} ± {value.std:.3f}"

    return cell


def _differences(comparison: Comparison, other: str) -> Callable[[str, str], str]:
    return lambda method, column: _signed(comparison.paired(method, other, column))


def _signed(difference: Difference) -> str:
    text = f"{difference.mean:+.3f}"
    if difference.standard_error is not None:
        text += f" ± {difference.standard_error:.3f}"
    return f"**{text}**" if difference.is_clear else text


def _interval(difference: Difference) -> str:
    text = _signed(difference)
    if difference.half_width is None:
        return text
    low, high = difference.mean - difference.half_width, difference.mean + difference.half_width
    return f"{text} [{low:+.3f}, {high:+.3f}]"


def _time_of_draws(comparison: Comparison, method: str) -> float:
    return statistics.fmean(run.balance_share for run in comparison.runs[method])


def _markdown(rows: Sequence[str], columns: Sequence[str], cell: Callable[[str, str], str]) -> str:
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [f"| `{row}` | " + " | ".join(cell(row, column) for column in columns) + " |" for row in rows]
    return "\n".join(lines)
