"""Showing packs of the training split as a run names them: each sample slice with its text and where it came from."""

from collections.abc import Iterator, Sequence

from mft_megatron.data.loading.dataset import PackedDataset, packed_lengths
from mft_megatron.data.storage.ledger import Ledger, TaskEntry
from mft_megatron.errors import InputError

from .inspect import marked, tokenizer_of


def parse_packs(text: str) -> tuple[int, ...]:
    """Read the indices of ``--packs``, separated by commas.

    Raises:
        InputError: something else.
    """
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise InputError(f"--packs {text}: give indices of packs, as the event 'bad step' names them, e.g. 12,40")
    return tuple(int(word) for word in words)


def show_packs(
    prefix: str, ledger: Ledger, packs: Sequence[int], seq_length: int | None, colour: bool
) -> Iterator[str]:
    """Write the sample slices of packs of the training split, with supervised text marked as for single samples.

    Args:
        prefix: of the data set.
        ledger: of the data set.
        packs: indices of packs.
        seq_length: tokens of a pack; ``None`` where the data set is packed for one length.
        colour: whether to use colour.

    Raises:
        InputError: there is no such pack, the length is not given or not there, or the tokenizer is missing.
    """
    lengths = packed_lengths(prefix)
    if seq_length is None and len(lengths) > 1:
        raise InputError(f"--packs: {prefix} is packed for {', '.join(map(str, lengths))}; add --seq-length")
    dataset = PackedDataset.open(prefix, lengths[0] if seq_length is None else seq_length)
    split = dataset.split("train")
    for pack in packs:
        if pack >= split.num_packs:
            raise InputError(
                f"--packs {pack}: {prefix} has packs 0 to {split.num_packs - 1} of {dataset.seq_length} tokens; give "
                "one of these"
            )
    tokenizer = tokenizer_of(ledger, "packs cannot be shown")
    first_of_task = [sum(task.kept for task in ledger.tasks[:index]) for index in range(len(ledger.tasks))]
    for pack in packs:
        slices = split.slices_of(pack)
        yield f"\n══ pack {pack}: {len(slices.samples)} sample slices, {slices.num_tokens} tokens"
        for sample, start, length in zip(*(values.tolist() for values in slices), strict=True):
            task = int(dataset.task_ids[sample])
            tokens = slice(start, start + length)
            part = "" if length == len(dataset.tokens[sample]) else f" {start} to {start + length - 1} of the sample"
            weight = 1.0 if dataset.sample_weights is None else float(dataset.sample_weights[sample])
            weighs = f", weight {weight:g}" if weight != 1 else ""
            origin = origin_of(ledger.tasks[task], sample - first_of_task[task])
            yield f"\n── {dataset.tasks[task]}, sample {sample}: {length} tokens{part}{weighs}; {origin}"
            of_tokens = (dataset.token_weights or dataset.mask)[sample]
            yield marked(tokenizer, dataset.tokens[sample][tokens], of_tokens[tokens], colour)


def origin_of(task: TaskEntry, number: int) -> str:
    """The file and line that a task's sample was read from, in words, as far as the ledger knows.

    Samples are stored in the order of the input. Where records were left out, or split into several samples, the ledger
    knows how many and not which, and the words name all that the sample may come from.

    Args:
        task: entry of the task.
        number: index of the sample among those of the task.
    """
    first = max(number - task.added, 0)
    last = max(min(number + sum(task.dropped.values()), task.samples_in - 1), first)
    files = [source.path for source in task.sources]
    named = " ".join(files) if len(files) <= 3 else f"{files[0]} … {files[-1]} ({len(files)} files)"
    if sum(source.lines for source in task.sources) != task.samples_in:
        records = f"record {first + 1}" if first == last else f"one of the records {first + 1} to {last + 1}"
        return f"{records} of {named}"
    (file, line), (last_file, last_line) = _line(task, first), _line(task, last)
    if (file, line) == (last_file, last_line):
        return f"{file}:{line}"
    return f"one of the lines {file}:{line} to {last_file}:{last_line}"


def _line(task: TaskEntry, record: int) -> tuple[str, int]:
    """File and line, counted from 1, of a record where each line is one."""
    for source in task.sources:
        if record < source.lines:
            return source.path, record + 1
        record -= source.lines
    raise ValueError(f"task {task.name} has fewer records")
