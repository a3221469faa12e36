"""``pretrain_mft.py --dry-run``: what ranks of a run need, from a machine without GPUs."""

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from mft_megatron.arguments.command import CommandLine
from mft_megatron.arguments.groups.dry_run import DryRunArguments
from mft_megatron.arguments.table import Arguments
from mft_megatron.errors import InputError
from mft_megatron.options import out_of_range

from .processes import RankError, run_in_processes
from .rank_report import RankReport
from .report.advice import advice
from .report.tables import details, table
from .report.verdict import UNKNOWN, Verdict, verdict


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
    from mft_megatron.training.saving.data_order import model_vocab_size

    from .rank_run import run_rank
    from .report.heading import heading
    from .start import started

    with started(command_line) as start:
        about = list(heading(start, gpu.name))
        if not options.json:
            print("\n".join(about), end="\n\n", flush=True)
        vocab_size = model_vocab_size(start.arguments, start.dataset)
        run = functools.partial(
            run_rank,
            start.measured,
            start.dataset,
            vocab_size=vocab_size,
            busiest_expert=options.busiest_expert,
            micro_batches=start.micro_batches,
        )
        reports = _reports(run_in_processes(run, start.ranks))
        results = [Result(report, *judge(start.arguments, report, gpu.memory)) for report in reports]
    if options.json:
        content = {"about": about, "gpu": options.gpu, "gpu_memory": gpu.memory, "not_known": UNKNOWN}
        print(json.dumps({**content, "ranks": [result.as_json() for result in results]}, indent=1))
    else:
        print("\n".join(report_lines(results)))
    return 1 if any(result.verdict.fits == "no" for result in results) else 0


def _reports(ranks: Iterator[RankReport]) -> list[RankReport]:
    """Wait for the reports, and say which are there."""
    reports = []
    try:
        for report in ranks:
            print(f"rank {report.rank}: {report.seconds:.0f} s", file=sys.stderr, flush=True)
            reports.append(report)
    except RankError as error:
        print(error, file=sys.stderr, flush=True)
        raise InputError(f"--dry-run cannot simulate this run: {error.summary}; the lines above say where") from None
    return reports


@dataclasses.dataclass(frozen=True)
class Result:
    """A rank as it is printed.

    Attributes:
        report: what was counted.
        verdict: whether it fits.
        advice: what to try if it does not, or may not.
    """

    report: RankReport
    verdict: Verdict
    advice: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        judged = self.verdict
        verdict = {"when": judged.when, "allowance": judged.allowance, "free": judged.free, "fits": judged.fits}
        return {**self.report.as_json(), **verdict, "advice": list(self.advice)}


def judge(arguments: Arguments, report: RankReport, gpu: int) -> tuple[Verdict, Sequence[str]]:
    """Compare a rank with a GPU of ``gpu`` bytes; the advice is empty where it fits."""
    judged = verdict(report, gpu)
    return judged, [] if judged.fits == "yes" else advice(arguments, report)


def report_lines(results: Sequence[Result]) -> Iterator[str]:
    """Lines of the report: the table, advice, the details of each rank, and what is not known."""
    yield from table([result.report for result in results], [result.verdict for result in results])
    for result in results:
        if result.advice:
            may = "does not fit" if result.verdict.fits == "no" else "may not fit"
            yield f"rank {result.report.rank} {may} ({result.verdict.when}); what it does not use yet, by size:"
            yield from (f"  {words}" for words in result.advice)
            yield ""
    for result in results:
        yield from details(result.report)
    yield from UNKNOWN
