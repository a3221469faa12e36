"""The first lines of a report: layout, data, first step, and notes."""

from collections.abc import Iterator

from mft_megatron.dry_run.start import DryStart
from mft_megatron.training.loop import next_plan
from mft_megatron.training.progress import Progress


def heading(start: DryStart, gpu: str) -> Iterator[str]:
    """Lines about the run: the layout, the data, the first step and notes."""
    arguments, dataset, layout = start.arguments, start.dataset, start.arguments.distributed
    sizes = {
        "TP": layout.tensor_model_parallel_size,
        "PP": layout.pipeline_model_parallel_size,
        "VPP": layout.num_virtual_stages_per_pipeline_rank or 1,
        "CP": layout.context_parallel_size,
        "EP": layout.expert_model_parallel_size,
        "DP": arguments.data_parallel_size,
    }
    words = " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "no parallelism"
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
    for note in start.notes:
        yield f"note: {note}"
