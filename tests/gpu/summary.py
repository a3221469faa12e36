"""The table at the end of the GPU tests: a row for each test function and first parameter.

A row says how many tests passed, failed and were skipped and why, the seconds of their calls, and the error that is
nearest to its bound.
"""

import collections

NO_DEVICE = "needs a CUDA device"
WIDTH = 78


def row_of(item):
    """The row of a test: its file, what it shows, and its first parameter."""
    words = item.originalname.removeprefix("test_").replace("_", " ")
    parameters = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    place = item.path.stem.removeprefix("test_cuda_").replace("_", " ")
    return f"{place}: {words}" + (f" [{parameters[0]}]" if parameters else "")


def table(reports):
    """Lines of the table.

    Args:
        reports: pytest's, of tests of this folder; several of one test where its set-up or end failed.
    """
    rows = collections.defaultdict(list)
    for report in reports:
        properties = dict(getattr(report, "user_properties", ()))
        if "row" in properties:
            rows[properties["row"]].append(report)
    if not rows:
        return []
    head = f"{'check on the GPU':{WIDTH}} {'passed':>6} {'failed':>6} {'skipped':>7} {'error / bound':>19} {'s':>6}"
    return ["", head, *(_line(row, reports) for row, reports in rows.items())]


def _line(row, reports):
    outcomes = collections.Counter(report.outcome for report in reports)
    errors = [value for report in reports for name, value in report.user_properties if name == "error"]
    error, bound = max(errors, key=lambda pair: pair[0] / pair[1], default=(None, None))
    measured = "" if error is None else f"{error:.1e} / {bound:.0e}"
    seconds = sum(report.duration for report in reports)
    numbers = f"{outcomes['passed']:>6} {outcomes['failed']:>6} {outcomes['skipped']:>7} {measured:>19} {seconds:>6.1f}"
    return f"{row[:WIDTH]:{WIDTH}} {numbers}{_reasons(reports)}"


def _reasons(reports):
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in reports if report.outcome == "skipped"}
    return f"  ({'; '.join(sorted(reasons))})" if reasons else ""
