"""table.md and results.json of a comparison of all methods."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from methods import BALANCERS, COMPARED, METHODS
from results import Comparison, Difference


def table(comparison: Comparison, seeds: Sequence[int], iterations: int) -> str:
    """All tables, as Markdown."""
    parts = [
        f"Validation losses after {iterations} steps, mean ± standard deviation over seeds "
        f"{', '.join(map(str, seeds))}. In bold: the smallest, where it is below the next one beyond the 95 % "
        "interval of their differences seed by seed.",
        _losses(comparison, "final"),
        "The smallest validation loss in the run, for each column by itself.",
        _losses(comparison, "best"),
    ]
    for other, methods in COMPARED.items():
        parts += [
            f"Final loss minus that of `{other}` with the same seed: mean ± standard error. In bold: 0 is outside the "
            f"95 % interval (Student's t, {len(seeds)} seeds).",
            _markdown(methods, comparison.columns, _differences(comparison, other)),
        ]
    share = {method: comparison.mean_share(method) for method in METHODS}
    weight = {method: comparison.last_weight(method) for method in BALANCERS}
    time = {method: _time_of_draws(comparison, method) for method in BALANCERS}
    parts += [
        "Realised share of the objective, mean over all steps and seeds; 0 in a step that has none of the task.",
        _markdown(METHODS, comparison.tasks, lambda method, task: f"{share[method][task]:.1%}"),
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
    for method, runs in comparison.runs.items():
        methods[method] = {
            "options": METHODS[method].options,
            "runs": {
                str(seed): [
                    {"step": int(step), **values} for step, values in zip(run.eval_step_E, run.columns_E, strict=True)
                ]
                for seed, run in zip(seeds, runs, strict=True)
            },
            "share": comparison.mean_share(method),
            "last weight": comparison.last_weight(method),
            "time of draws": _time_of_draws(comparison, method),
        }
        for which in ("final", "best"):
            methods[method][which] = {
                column: dataclasses.asdict(comparison.spread(method, column, which)) for column in comparison.columns
            }
    for other, compared in COMPARED.items():
        for method in compared:
            methods[method][f"final minus {other}"] = {
                column: dataclasses.asdict(comparison.paired(method, other, column)) for column in comparison.columns
            }
    return {"settings": settings, "tasks": list(comparison.tasks), "methods": methods}


def _losses(comparison: Comparison, which: str) -> str:
    winners = {column: comparison.winner(column, which) for column in comparison.columns}

    def cell(method: str, column: str) -> str:
        value = comparison.spread(method, column, which)
        text = f"{value.mean:.3f}" if value.std is None else f"{value.mean:.3f} ± {value.std:.3f}"
        return f"**{text}**" if winners[column] == method else text

    return _markdown(METHODS, comparison.columns, cell)


def _differences(comparison: Comparison, other: str) -> Callable[[str, str], str]:
    return lambda method, column: _difference(comparison.paired(method, other, column))


def _difference(difference: Difference) -> str:
    text = f"{difference.mean:+.3f}"
    if difference.standard_error is not None:
        text += f" ± {difference.standard_error:.3f}"
    return f"**{text}**" if difference.is_clear else text


def _time_of_draws(comparison: Comparison, method: str) -> float:
    return statistics.fmean(run.balance_share for run in comparison.runs[method])


def _markdown(rows: Sequence[str], columns: Sequence[str], cell: Callable[[str, str], str]) -> str:
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [f"| `{row}` | " + " | ".join(cell(row, column) for column in columns) + " |" for row in rows]
    return "\n".join(lines)
