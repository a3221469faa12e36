"""The output of a dry run: table, advice and details, or the same as JSON."""

import dataclasses
import json

import pytest

from mft_megatron.arguments.groups.dry_run import DryRunArguments
from mft_megatron.dry_run.command import Result, _reports, judge, report_lines
from mft_megatron.dry_run.processes import RankError
from mft_megatron.dry_run.report.advice import advice
from mft_megatron.errors import InputError
from mft_megatron.mcore.platform.simulated_gpu import SIMULATED_GPUS
from mft_megatron.options import info_of
from tests.arguments.command_line import parse
from tests.dry_run.made_reports import GIB, report


def largest(**gib):
    """A report whose peak has these GiB in some categories."""
    one = report()
    step = one.steps[0]
    memory = dataclasses.replace(
        step.memory,
        by_category={**dict.fromkeys(step.memory.by_category, 0), **{name: size * GIB for name, size in gib.items()}},
        peak=sum(gib.values()) * GIB,
    )
    step = dataclasses.replace(step, memory=memory)
    return dataclasses.replace(one, steps=(step, step), evaluation=None)


@pytest.mark.parametrize(
    ("words", "sizes", "first"),
    [
        ("", {"optimizer": 60}, "--bf16"),
        ("--bf16", {"activations": 60}, "--recompute-granularity full"),
        ("--bf16 --tensor-model-parallel-size 2", {"activations": 60}, "--sequence-parallel"),
        ("--bf16", {"optimizer": 60, "activations": 1}, "--use-distributed-optimizer with a larger --world-size"),
        ("--bf16", {"logits": 9, "weights": 1}, "more ranks"),
        ("--bf16 --cross-entropy-impl megatron", {"logits": 9, "weights": 1}, "--cross-entropy-impl fused-linear"),
    ],
)
def test_advice_begins_with_the_largest(words, sizes, first):
    world = 2 if "tensor" in words else 1
    assert advice(parse(words, world), largest(**sizes))[0].startswith(first)


def test_advice_names_nothing_that_is_in_use():
    words = (
        "--bf16 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --micro-batch-size 1"
    )
    tries = advice(parse(words), largest(activations=60, weights=20))
    assert [one for one in tries if one.startswith(("--bf16", "--recompute", "a smaller"))] == []


def results(gpu):
    reports = [report(0), report(3, second=50)]
    return [Result(one, *judge(parse("--bf16"), one, gpu * GIB)) for one in reports]


def test_ranks_that_do_not_fit_are_named():
    lines = list(report_lines(results(40)))
    assert "rank 3 does not fit (step 2); what it does not use yet, by size:" in lines
    assert not any(line.startswith("rank 0 does not fit") for line in lines)
    assert any(line.startswith("allowance: 2 GiB") for line in lines)
    assert not any("fit (" in line for line in report_lines(results(80)))


def test_an_unexpected_error_is_one_line_below_its_traceback(capsys):
    def ranks():
        yield report()
        raise RankError("rank 3:\nTraceback", "rank 3: ValueError: unknown")

    with pytest.raises(InputError, match="cannot simulate this run: rank 3: ValueError: unknown; the lines above"):
        _reports(ranks())
    assert capsys.readouterr().err.splitlines() == ["rank 0: 3 s", "rank 3:", "Traceback"]


def test_json_has_everything():
    no = json.loads(json.dumps(results(40)[1].as_json()))
    assert (no["rank"], no["fits"], no["when"], no["peak"]) == (3, "no", "step 2", 50 * GIB)
    assert no["free"] == 40 * GIB - no["peak"] - no["allowance"]
    assert no["steps"][1]["memory"]["largest"][0]["line"] == "a/b.py:1"
    assert no["advice"]


def test_the_gpus_of_the_option_are_those_that_are_simulated():
    (field,) = (field for field in dataclasses.fields(DryRunArguments) if field.name == "gpu")
    assert info_of(field).choices == tuple(SIMULATED_GPUS)
