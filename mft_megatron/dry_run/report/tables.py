"""The report of a dry run as text: a table with a column for each rank, then the details of each rank."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from mft_megatron.dry_run.rank_report import CATEGORIES, HostWaits, LiveTensors, Memory, Messages, RankReport, Step

from .verdict import GIB, Verdict


@dataclasses.dataclass(frozen=True)
class Unit:
    """A unit of memory: its name and its bytes."""

    name: str
    bytes: int

    def text(self, size: int) -> str:
        """A number of bytes in this unit."""
        return f"{size / self.bytes:.2f}"


GIBIBYTES, MEBIBYTES = Unit("GiB", GIB), Unit("MiB", 2**20)
COLUMNS = 4  # ranks side by side
LINES = 8  # of code that are listed of each kind


def table(reports: Sequence[RankReport], verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Lines with the numbers of all ranks, as many side by side as fit a terminal."""
    pairs = list(zip(reports, verdicts, strict=True))
    for first in range(0, len(pairs), COLUMNS):
        yield from _block(pairs[first : first + COLUMNS])
        yield ""


def details(report: RankReport) -> Iterator[str]:
    """Lines about one rank: what is alive at its peak, its messages, and the lines of code that make the host wait."""
    step = report.steps[-1]
    yield f"rank {report.rank}, step {step.number}: peak at {step.memory.line}, where these are alive:"
    unit = _unit([report.peak])
    yield from _rows({unit.name: lambda live: unit.text(live.bytes), **_LIVE}, step.memory.largest, "nothing")
    yield f"rank {report.rank}, step {step.number}: messages"
    yield from _rows(_MESSAGES, _sent(step), "none")
    yield f"rank {report.rank}, step {step.number}: waits of the host for the GPU"
    yield from _rows(_WAITS, step.waits, "none")
    yield ""


def _block(pairs: Sequence[tuple[RankReport, Verdict]]) -> Iterator[str]:
    rows = {**_about(), **_memory(pairs, _unit(judged.peak for _, judged in pairs)), **_work()}
    cells = [(name, *(cell(report, judged) for report, judged in pairs)) for name, cell in rows.items()]
    width = max(len(name) for name, *_ in cells)
    widths = [max(len(row[column]) for row in cells) for column in range(1, len(pairs) + 1)]
    for name, *values in cells:
        aligned = (value.rjust(wide) for value, wide in zip(values, widths, strict=True))
        yield f"{name.ljust(width)}   {'   '.join(aligned)}".rstrip()


Cell = Callable[[RankReport, Verdict], str]


def _about() -> dict[str, Cell]:
    return {
        "rank": lambda report, _: str(report.rank),
        "stage": lambda report, _: str(report.position["pipeline"]),
        "layers": lambda report, _: _layers(report),
        "parameters": lambda report, _: f"{report.parameters:,}",
        "of them trained": lambda report, _: f"{report.trained_parameters:,}",
    }


def _memory(pairs: Sequence[tuple[RankReport, Verdict]], unit: Unit) -> dict[str, Cell]:
    size, name = unit.text, unit.name
    rows: dict[str, Cell] = {f"{name} at the peak of a step": lambda report, _: ""}
    rows.update({f"  {category}": functools.partial(_of_category, unit, category) for category in CATEGORIES})
    rows["  sum"] = lambda report, _: size(_last(report).memory.peak)
    if any(report.steps[0].memory.peak > _last(report).memory.peak for report, _ in pairs):
        rows[f"{name} at the peak of the first step"] = lambda report, _: size(report.steps[0].memory.peak)
    if any(report.longest is not None for report, _ in pairs):
        rows[f"{name} at the peak with the longest rows"] = lambda report, _: _peak(report.longest, unit)
    rows[f"{name} at the peak of an evaluation"] = lambda report, _: _peak(report.evaluation, unit)
    rows[f"{name} at the peak of a save"] = lambda report, _: _peak(report.save, unit)
    rows["  and on the host"] = lambda report, _: "-" if report.save_host is None else size(report.save_host)
    rows["GiB of the GPU"] = lambda _, judged: GIBIBYTES.text(judged.gpu)
    rows["  allowance"] = lambda _, judged: GIBIBYTES.text(judged.allowance)
    rows["  free"] = lambda _, judged: GIBIBYTES.text(judged.free)
    rows["fits"] = lambda _, judged: judged.fits
    return rows


def _work() -> dict[str, Cell]:
    return {
        "in a step": lambda report, _: "",
        "  micro-batches": lambda report, _: str(_last(report).micro_batches),
        "  TFLOPs": lambda report, _: f"{_last(report).operations / 1e12:,.1f}",
        "  kernels": lambda report, _: f"{_last(report).kernels:,}",
        "  messages": lambda report, _: f"{sum(m.count for m in _sent(_last(report))):,}",
        "  GiB of messages": lambda report, _: GIBIBYTES.text(sum(m.bytes for m in _sent(_last(report)))),
        "  copies to the GPU": lambda report, _: f"{sum(c.count for c in _last(report).copies):,}",
        "  waits in a micro-batch": lambda report, _: f"{waits_in_micro_batch(_last(report)):g}",
        "  waits outside of them": lambda report, _: f"{sum(w.outside for w in _last(report).waits):,}",
    }


def waits_in_micro_batch(step: Step) -> float:
    """Mean number of times that the host waits for the GPU in a micro-batch."""
    return round(sum(wait.in_micro_batches for wait in step.waits) / max(step.micro_batches, 1), 2)


def _sent(step: Step) -> list[Messages]:
    """Messages of a step to other ranks; those within a group of one rank leave no GPU."""
    return [message for message in step.messages if message.ranks > 1]


def _of_category(unit: Unit, category: str, report: RankReport, _: Verdict) -> str:
    return unit.text(_last(report).memory.by_category.get(category, 0))


def _unit(peaks: Iterable[int]) -> Unit:
    """The unit for a column of peaks: mebibytes for small models."""
    return GIBIBYTES if max(peaks) >= GIB else MEBIBYTES


def _last(report: RankReport) -> Step:
    return report.steps[-1]


def _layers(report: RankReport) -> str:
    numbers = report.layers
    if not numbers:
        words = "none"
    elif numbers[-1] - numbers[0] == len(numbers) - 1:
        words = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    else:
        words = f"{len(numbers)} of {numbers[0]}-{numbers[-1]}"
    return f"{'E ' if report.embedding else ''}{words}{' L' if report.output else ''}"


def _peak(memory: Memory | None, unit: Unit) -> str:
    return "-" if memory is None else unit.text(memory.peak)


_LIVE: Mapping[str, Callable[[LiveTensors], str]] = {
    "category": lambda live: live.category,
    "tensors": lambda live: f"{live.count:,}",
    "made at": lambda live: live.line,
}
_MESSAGES: Mapping[str, Callable[[Messages], str]] = {
    "GiB": lambda message: f"{message.bytes / GIB:.3f}",
    "count": lambda message: f"{message.count:,}",
    "kind": lambda message: message.kind,
    "group": lambda message: f"{message.group} of {message.ranks}",
}
_WAITS: Mapping[str, Callable[[HostWaits], str]] = {
    "in micro-batches": lambda wait: f"{wait.in_micro_batches:,}",
    "outside": lambda wait: f"{wait.outside:,}",
    "for": lambda wait: wait.kind,
    "at": lambda wait: wait.line,
}


def _rows(columns: Mapping[str, Callable[..., str]], entries: Sequence[object], none: str) -> Iterator[str]:
    """Lines of a table, with a head; the entries beyond :data:`LINES` are counted."""
    if not entries:
        yield f"  {none}"
        return
    cells = [tuple(columns), *(tuple(cell(entry) for cell in columns.values()) for entry in entries[:LINES])]
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    for row in cells:
        yield "  " + "  ".join(value.ljust(wide) for value, wide in zip(row, widths, strict=True)).rstrip()
    if len(entries) > LINES:
        yield f"  and {len(entries) - LINES} more, in --json"
