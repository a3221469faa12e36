"""The ledger of a data set as a table in text."""

from collections.abc import Iterator

from mft_megatron.data.packing.packing_options import SPLITS
from mft_megatron.data.storage.ledger import Ledger, LengthEntry


def ledger_table(ledger: Ledger) -> str:
    """Write a ledger in aligned columns: for every length the tasks, then the packs."""
    lines = []
    for length, entry in ledger.lengths.items():
        rows: list[tuple[str, ...]] = [("task", "in", "kept", "truncated", "dropped", "tokens", "supervised", *SPLITS)]
        for task, cut in zip(ledger.tasks, entry.tasks, strict=True):
            dropped = ", ".join(f"{reason} {n}" for reason, n in (task.dropped | cut.dropped).items()) or "0"
            numbers = (task.samples_in, cut.kept, cut.truncated)
            counts = (cut.tokens, cut.supervised_tokens, *cut.splits.values())
            rows.append((task.name, *map("{:,}".format, numbers), dropped, *map("{:,}".format, counts)))
        lines += _aligned(rows)
        lines += _windows_and_uses(ledger, entry)
        packer = "" if entry.joined or entry.padded else f", packer {entry.packer}"
        order = "mixed" if entry.order_version > 1 else "random"
        for split, packed in entry.packs.items():
            lines.append(
                f"{split}: {packed.samples:,} samples in {packed.packs:,} packs of {length}, "
                f"{100 * packed.fill:.2f} % filled{f'{packer}, order {order}' if split == 'train' else ''}"
            )
    return "\n".join([*lines, *_weights(ledger)])


def _weights(ledger: Ledger) -> Iterator[str]:
    """Describe the weights of each task in which some are not 1."""
    for task in ledger.tasks:
        parts = [
            f"{of['others']:,} {what} have another weight than 1 "
            f"(from {of['min']:g} to {of['max']:g}, sum {of['sum']:,.6g})"
            for what, of in task.weights.items()
            if of["others"]
        ]
        if parts:
            yield f"{task.name}: {'; '.join(parts)}"


def _windows_and_uses(ledger: Ledger, entry: LengthEntry) -> Iterator[str]:
    """Describe each task whose samples were cut into windows, or are not used exactly once."""
    for task, cut in zip(ledger.tasks, entry.tasks, strict=True):
        if cut.windowed:
            left_out = f", {cut.unsupervised_windows:,} without a target left out" if cut.unsupervised_windows else ""
            yield f"{task.name}: {cut.windowed:,} samples cut into {cut.windows:,} windows{left_out}"
        if set(cut.uses) - {"1"}:
            times = ", ".join(f"{n:,} used {time} times" for time, n in cut.uses.items())
            yield f"{task.name}: in one pass over the training rows, {times}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first = widths.pop(0)
    return [
        "  ".join((row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], widths, strict=True))))
        for row in rows
    ]
