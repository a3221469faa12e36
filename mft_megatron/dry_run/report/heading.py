"""The first lines of a report: layout, data, first step, kernels, and notes."""

from collections.abc import Iterator

from mft_megatron.arguments.notes import notes
from mft_megatron.dry_run.start import DryStart
from mft_megatron.mcore.model import kernels
from mft_megatron.mcore.model.config import transformer_config
from mft_megatron.training.loop import next_plan
from mft_megatron.training.progress import Progress


def heading(start: DryStart, gpu: str) -> Iterator[str]:
    """Lines about the run: the layout, the data, the first step, the kernels and notes."""
    arguments, dataset = start.arguments, start.dataset
    words = arguments.layout_in_words or "no parallelism"
    yield f"dry run: {arguments.world_size} rank(s) on {gpu}, simulated; {words}; {arguments.precision.name}"
    plan = next_plan(dataset, arguments, Progress(*arguments.progress))
    tokens, positions = dataset.split("train").num_tokens(plan.packs_G), len(plan.packs_G) * dataset.seq_length
    mode = dataset.entry.options["padding_mode"]
    source = arguments.data.data_path if start.mock is None else ", ".join(task.text for task in start.mock)
    yield (
        f"{'data' if start.mock is None else 'mock data'} {source}: rows of {dataset.seq_length:,} tokens "
        f"(--padding-mode {mode}); the first step has {plan.num_packs:,} rows, {tokens:,} tokens "
        f"({tokens / positions:.1%} of the positions), {int(plan.counts.tokens_K.sum()):,} of them supervised"
    )
    for name, count in zip(dataset.tasks, plan.counts.tokens_K.tolist(), strict=True):
        if len(dataset.tasks) > 1:
            yield f"  task {name}: {count:,} supervised tokens"
    if len(arguments.batch_sizes.remaining(arguments.progress[1])) > 1:
        yield f"batches grow: memory and counts are those of a step of {start.largest_batch:,} rows, the largest"
    if start.computed_micro_batches < start.micro_batches:
        yield (
            f"of the {start.micro_batches} micro-batches of a step {start.computed_micro_batches} are computed, with "
            "which memory reaches its peak; counts are multiplied to those of the step (--all-micro-batches computes "
            "all)"
        )
    yield kernels.describe(arguments, transformer_config(arguments))
    # mock data are made for two steps, so nothing follows from how many rows there are
    num_packs = dataset.split("train").num_packs if start.mock is None else max(arguments.batch_sizes.sizes)
    probable = notes(arguments, num_packs, "valid" in dataset.splits, on_gpu=True)
    for note in (*start.notes, *probable):
        yield f"note: {note}"
