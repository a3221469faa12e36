"""The certificate of packs as text and as JSON."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .isolation import Bounds, RowReport

HEADER = f"{'row':>8} {'samples':>7}  {'replaced':<24} {'others':>9} {'itself':>9} {'unpacked':>9}  tasks"


def legend(bounds: Bounds) -> str:
    """The lines above the table: what its columns are, with their bounds."""
    if bounds.others > 0:
        others = f"up to {bounds.others:.2g}"
    elif bounds.noisy > 0:
        others = f"the same bits; up to {bounds.noisy:.2g} where two passes over a row differ"
    else:
        others = "the same bits"
    kind = "mean" if bounds.mean else "largest"
    return (
        "differences of token losses, in nats, relative where a loss is above 1:\n"
        f"  others    largest of any other sample when one is replaced; allowed: {others}\n"
        f"  itself    largest of the replaced sample; needed: at least {bounds.of_itself(repeatable=True):.2g}\n"
        f"  unpacked  {kind} between the row and its samples alone; allowed: up to {bounds.unpacked:.2g}"
    )


def line(report: RowReport) -> str:
    """The line of a row in the table."""
    replaced = f"{report.replaced + 1} ({report.tasks[report.replaced]})"
    others = "0" if report.others == 0 else f"{report.others:.2e}"
    tasks = ", ".join(f"{name} {count}" for name, count in Counter(report.tasks).items())
    return (
        f"{report.pack:>8} {len(report.samples):>7}  {replaced:<24} {others:>9} {report.itself:>9.2e} "
        f"{report.unpacked:>9.2e}  {tasks}"
    )


def is_certified(reports: Iterable[RowReport], bounds: Bounds) -> bool:
    """Whether nothing in any row contradicts the certificate."""
    return not any(report.failures(bounds) for report in reports)


def verdict(reports: Sequence[RowReport], bounds: Bounds) -> str:
    """The last line; where rows failed, with what was found in the first of them."""
    failed = [found for report in reports if (found := report.failures(bounds))]
    if failed:
        more = f"; {len(failed) - 1} more of {len(reports)} rows failed" if len(failed) > 1 else ""
        return f"FAILED: {'; '.join(failed[0])}{more}"
    samples = sum(len(report.samples) for report in reports)
    rows = f"{len(reports)} row" + ("s" if len(reports) > 1 else "")
    return f"certified: in {rows} with {samples} samples none sees another"


def as_json(facts: Mapping[str, Any], reports: Sequence[RowReport], bounds: Bounds) -> dict[str, Any]:
    """The whole certificate as values of JSON.

    Args:
        facts: the data set, the model, the device and such, by name.
        reports: of all rows.
        bounds: that were applied.
    """
    rows = [dataclasses.asdict(report) | {"failures": report.failures(bounds)} for report in reports]
    return {
        "certificate": "packs",
        "certified": is_certified(reports, bounds),
        **facts,
        "bounds": dataclasses.asdict(bounds),
        "rows": rows,
    }
