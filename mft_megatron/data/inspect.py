"""Looking into a packed data set: its ledger as a table, samples with their mask, and a check of everything."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mft_megatron.data.dataset import PackedDataset, PackedSplit, check_files
from mft_megatron.data.ledger import Ledger
from mft_megatron.data.packing import pack_split
from mft_megatron.data.preprocess import supervised_tokens
from mft_megatron.data.tokenizer import load_tokenizer
from mft_megatron.errors import InputError

MARKS = {True: ("\033[32m", "\033[0m"), False: ("⟦", "⟧")}


def ledger_table(ledger: Ledger) -> str:
    """The ledger in aligned columns: tasks, then packs."""
    rows = [("task", "in", "kept", "truncated", "dropped", "tokens", "supervised", "train", "valid", "test")]
    for task in ledger.tasks:
        dropped = ", ".join(f"{reason} {n}" for reason, n in task.dropped.items()) or "0"
        numbers = (task.samples_in, task.kept, task.truncated)
        counts = (task.tokens, task.supervised_tokens, *task.splits.values())
        rows.append((task.name, *map("{:,}".format, numbers), dropped, *map("{:,}".format, counts)))
    lines = _aligned(rows)
    for length, splits in ledger.packs.items():
        for split, entry in splits.items():
            lines.append(
                f"{split}: {entry.samples:,} samples in {entry.packs:,} packs of {length}, "
                f"{100 * entry.fill:.2f} % filled"
            )
    return "\n".join(lines)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first = widths.pop(0)
    return [
        "  ".join((row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], widths, strict=True))))
        for row in rows
    ]


def show_samples(prefix: str, ledger: Ledger, number: int, colour: bool) -> Iterator[str]:
    """The first ``number`` samples of each task, supervised text in colour or in ⟦brackets⟧."""
    if number < 1:
        return
    if not Path(ledger.tokenizer.model).exists():
        raise InputError(f"the tokenizer {ledger.tokenizer.model} is gone, so samples cannot be shown; use --samples 0")
    tokenizer = load_tokenizer(ledger.tokenizer.type, ledger.tokenizer.model)
    dataset = PackedDataset.open(prefix, int(next(iter(ledger.packs))))
    for task, name in enumerate(dataset.tasks):
        first = int(np.searchsorted(dataset.task_ids, task))
        for sample in range(first, min(first + number, first + ledger.tasks[task].kept)):
            yield f"\n── {name}, sample {sample}: {len(dataset.tokens[sample])} tokens"
            yield marked(tokenizer, dataset.tokens[sample], dataset.mask[sample], colour)


def marked(tokenizer, ids: np.ndarray, mask: np.ndarray, colour: bool) -> str:
    """The text of a sample; runs of supervised tokens stand between two marks."""
    opening, closing = MARKS[colour]
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1), len(ids)]
    text = []
    for start, end in itertools.pairwise(borders):
        part = tokenizer.decode(ids[start:end].tolist())
        text.append(f"{opening}{part}{closing}" if mask[start] else part)
    return "".join(text)


def check(prefix: str, ledger: Ledger) -> None:
    """Verify every hash, and that tokens, counts and packs are what the ledger and the index say.

    Raises:
        InputError: the first thing that does not agree.
    """
    check_files(prefix, ledger, hashes=True)
    for length in ledger.packs:
        dataset = PackedDataset.open(prefix, int(length))
        lengths, supervised = dataset.tokens.lengths, supervised_tokens(dataset.mask.items, dataset.tokens.lengths)
        _agree(f"{prefix}_loss_mask.idx: lengths", dataset.mask.lengths, lengths)
        for number, task in enumerate(ledger.tasks):
            own = dataset.task_ids == number
            found = (int(own.sum()), int(lengths[own].sum()), int(supervised[own].sum()))
            _agree(f"task {task.name}: samples, tokens, supervised tokens", found, _totals(task))
            in_and_out = task.kept + sum(task.dropped.values())
            _agree(f"task {task.name}: kept and dropped", in_and_out, task.samples_in)
        for name in dataset.splits:
            _check_split(prefix, dataset.split(name), lengths, supervised)


def _totals(task) -> tuple[int, int, int]:
    return task.kept, task.tokens, task.supervised_tokens


def _check_split(prefix: str, split: PackedSplit, lengths: np.ndarray, supervised: np.ndarray) -> None:
    packs = [split.samples_of(pack) for pack in range(split.num_packs)]
    members = np.sort(np.concatenate(packs))
    again = pack_split(members, lengths, split.dataset.task_ids, supervised, split.seq_length)
    where = f"{prefix}: packs of {split.name}"
    _agree(f"{where}: samples used more than once", len(np.unique(members)), len(members))
    _agree(f"{where}: order", np.concatenate(packs), again.sample_numbers)
    tokens_K, samples_K = split.counts(np.arange(split.num_packs))
    expected = [np.bincount(split.dataset.task_ids[members], w, split.num_tasks) for w in (supervised[members], None)]
    _agree(f"{where}: supervised tokens", tokens_K, expected[0])
    _agree(f"{where}: samples", samples_K, expected[1])


def _agree(what: str, found, expected) -> None:
    if not np.array_equal(found, expected):
        raise InputError(f"{what}: does not agree with the ledger; preprocess the data again")
