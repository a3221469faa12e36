"""Whether a rank fits, and the table that says so: every number stands in its rank's column."""

import pytest

from mft_megatron.dry_run.report.tables import details, table
from mft_megatron.dry_run.report.verdict import verdict
from tests.dry_run.made_reports import GIB, report


@pytest.mark.parametrize(
    ("gpu", "fits", "free"),
    [(40, "yes", 40 - 23), (23, "yes", 0), (22.5, "maybe", -0.5), (20, "maybe", -3), (19.9, "no", -3.1)],
)
def test_the_peak_and_the_allowance_decide(gpu, fits, free):
    judged = verdict(report(), int(gpu * GIB))
    assert (judged.fits, judged.when) == (fits, "step 1")
    assert judged.allowance == 2 * GIB + GIB  # a twentieth of 20 GiB
    assert judged.free / GIB == pytest.approx(free)


@pytest.mark.parametrize(
    ("peaks", "when"),
    [
        ({}, "step 1"),
        ({"second": 21}, "step 2"),
        ({"evaluation": 30}, "evaluation"),
        ({"save": 30}, "save"),
        ({"longest": 30}, "the longest rows"),
    ],
)
def test_the_highest_peak_counts(peaks, when):
    judged = verdict(report(**peaks), 80 * GIB)
    assert (judged.when, judged.peak) == (when, int(max([20, *peaks.values()]) * GIB))


def rows(reports, gpu=40):
    lines = list(table(reports, [verdict(one, gpu * GIB) for one in reports]))
    return {line.split("   ")[0].strip(): line.split("   ", 1)[1].split() for line in lines if "   " in line.strip()}


def test_the_columns_of_ranks():
    found = rows([report(0), report(3, second=50, save=25, host=12.5)])
    assert found["rank"] == ["0", "3"]
    assert found["layers"] == ["E", "1-10", "31-40", "L"]
    assert found["parameters"] == ["1,000,000,000"] * 2
    assert found["of them trained"] == ["2,000,000"] * 2
    assert found["weights"] == ["12.00", "44.00"]
    assert found["activations"] == ["1.00"] * 2
    assert found["sum"] == ["18.00", "50.00"]
    assert found["GiB at the peak of the first step"] == ["20.00"] * 2
    assert found["GiB at the peak of a save"] == ["-", "25.00"]
    assert found["and on the host"] == ["-", "12.50"]
    assert found["free"] == ["17.00", "-14.50"]
    assert found["fits"] == ["yes", "no"]
    assert found["TFLOPs"] == ["1,234.0"] * 2
    assert found["messages"] == ["648"] * 2
    assert found["GiB of messages"] == ["3.50"] * 2
    assert found["copies to the GPU"] == ["16"] * 2
    assert found["waits in a micro-batch"] == ["1"] * 2
    assert found["waits outside of them"] == ["3"] * 2


def test_a_first_step_that_needs_no_more_has_no_row():
    assert "GiB at the peak of the first step" not in rows([report(first=18.0)])


def test_the_longest_rows_have_a_row_where_rows_are_padded():
    found = rows([report(longest=25.0), report(1)])
    assert found["GiB at the peak with the longest rows"] == ["25.00", "-"]
    assert found["free"] == ["11.75", "17.00"]
    assert "GiB at the peak with the longest rows" not in rows([report()])


def test_small_models_are_in_mebibytes():
    small = report(first=0.5, second=0.5, evaluation=0.25)
    found = rows([small])
    assert (found["sum"], found["MiB at the peak of an evaluation"]) == (["512.00"], ["256.00"])
    assert any(line.startswith("  MiB ") for line in details(small))


def test_many_ranks_are_in_several_blocks():
    reports = [report(rank) for rank in range(6)]
    lines = list(table(reports, [verdict(one, 40 * GIB) for one in reports]))
    assert [line.split()[1:] for line in lines if line.startswith("rank")] == [["0", "1", "2", "3"], ["4", "5"]]


def test_details_name_lines_of_code():
    text = "\n".join(details(report()))
    assert "rank 0, step 2: peak at mft_megatron/mcore/trainer.py:10" in text
    assert "4.75  weights   1        a/b.py:1" in text
    assert "and 4 more" in text
    assert "3.000  640    all-reduce  tensor of 8" in text
    assert "8                 1        value  a/waits.py:5" in text
