"""``pretrain_mft.py --dry-run``: what ranks of a run need, from a machine without GPUs."""

import functools
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mft_megatron.arguments.command import CommandLine
from mft_megatron.arguments.groups.dry_run import DryRunArguments
from mft_megatron.errors import InputError
from mft_megatron.options import out_of_range

from .processes import run_in_processes
from .tables import details, table
from .verdict import UNKNOWN, verdict

if TYPE_CHECKING:
    from .start import DryStart


def dry_run(command_line: CommandLine) -> int:
    """Start a run without GPUs, take two steps of some ranks without content, and print what they need.

    Returns:
        the exit code: 0 where all these ranks fit the GPU or may fit, else 1.

    Raises:
        InputError: the run could not start, or cannot be simulated.
    """
    options = command_line.group(DryRunArguments)
    if problem := out_of_range(options):
        raise InputError(problem)
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise InputError("--dry-run: one process reports on any rank; start it without torchrun")
    from mft_megatron.mcore.platform import devices
    from mft_megatron.mcore.platform.simulated_gpu import SIMULATED_GPUS

    gpu = SIMULATED_GPUS[options.gpu]
    devices.simulate(gpu)
    # what follows imports Megatron-Core
    from mft_megatron.training.saving import model_vocab_size

    from .rank_run import run_rank
    from .start import started

    with started(command_line) as start:
        heading = list(_heading(start, gpu.name))
        if not options.json:
            print("\n".join(heading), end="\n\n", flush=True)
        vocab_size = model_vocab_size(start.arguments, start.dataset)
        run = functools.partial(run_rank, start.arguments, start.dataset, vocab_size=vocab_size)
        reports = []
        for report in run_in_processes(run, start.ranks):
            print(f"rank {report.rank}: {report.seconds:.0f} s", file=sys.stderr, flush=True)
            reports.append(report)
    verdicts = [verdict(report, gpu.memory) for report in reports]
    if options.json:
        ranks = [
            {**report.as_json(), "when": judged.when, "allowance": judged.allowance, "fits": judged.fits}
            for report, judged in zip(reports, verdicts, strict=True)
        ]
        content = {"about": heading, "gpu": options.gpu, "gpu_memory": gpu.memory, "notes": UNKNOWN, "ranks": ranks}
        print(json.dumps(content, indent=1))
    else:
        print("\n".join([*table(reports, verdicts), *(line for report in reports for line in details(report))]))
        print("\n".join(UNKNOWN))
    return 1 if any(judged.fits == "no" for judged in verdicts) else 0


def _heading(start: "DryStart", gpu: str) -> Iterator[str]:
    """Lines about the run: the layout, the data, the first step and notes."""
    from mft_megatron.training.loop import next_plan
    from mft_megatron.training.progress import Progress

    arguments, dataset, layout = start.arguments, start.dataset, start.arguments.distributed
    sizes: dict[str, Any] = {
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
