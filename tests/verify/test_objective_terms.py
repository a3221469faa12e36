"""The reference's own parts: terms of the objective by hand, the plan of a pass, whole tensors, the comparison."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch

from mft_megatron.arguments.groups.multi_task import MultiTaskArguments
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.mcore.parallel.whole_tensors import Piece, assembled
from mft_megatron.training.task_weights import initial_weights
from mft_megatron.verify.objective import plan
from mft_megatron.verify.objective.comparison import BOUNDS, Line, compare, hint, note_of_zeros, table
from mft_megatron.verify.objective.plan import check_pass
from mft_megatron.verify.objective.steps import Gradient, Step
from mft_megatron.verify.objective.terms import (
    StoredSamples,
    Text,
    Totals,
    asked_weights,
    coefficients,
    count,
    count_pass,
    targets,
    task_factors,
)
from tests.made_dataset import write_dataset

LENGTH = 128
TOKENS = np.arange(4)
# task 0: T = 2·3 + 1·1 = 7, M = 3; task 1: T = 0.5·2 = 1, M = 0.5; task 2 has nothing supervised
TEXTS = [
    Text(0, TOKENS, np.array([0.0, 1.0, 2.0]), 2.0),
    Text(0, TOKENS, np.array([0.0, 0.0, 1.0]), 1.0),
    Text(1, TOKENS, np.array([1.0, 0.0, 1.0]), 0.5),
    Text(2, TOKENS, np.zeros(3), 1.0),
]
WEIGHT_K = np.array([1.0, 3.0, 5.0])
# c_t of all tokens of all texts
BY_HAND = {
    "token": [[0, 2 / 8, 4 / 8], [0, 0, 1 / 8], [0.5 / 8, 0, 0.5 / 8]],
    "sample": [[0, 2 / 3.5 / 3, 4 / 3.5 / 3], [0, 0, 1 / 3.5], [0.25 / 3.5, 0, 0.25 / 3.5]],
    "task-token": [[0, 2 / 28, 4 / 28], [0, 0, 1 / 28], [0.375, 0, 0.375]],
    "task-sample": [[0, 2 / 36, 4 / 36], [0, 0, 1 / 12], [0.375, 0, 0.375]],
    # before the power of each sample: divided by the number of tasks
    "focal-sample": [[0, 1 / 9, 2 / 9], [0, 0, 1 / 6], [0.75, 0, 0.75]],
}


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    prefix = str(tmp_path_factory.mktemp("terms") / "data")
    write_dataset(prefix, LENGTH, longest=60, weighted="samples turns")
    return PackedDataset.open(prefix, LENGTH).split("train")


@pytest.mark.parametrize("loss", BY_HAND)
def test_coefficients_by_hand(loss):
    totals = count(TEXTS, 2, 3)
    assert totals.tokens_K.tolist() == [3, 2, 0]
    assert totals.token_weights_K.tolist() == [7, 1, 0]
    assert totals.sample_weights_K.tolist() == [3, 0.5, 0]
    factor_K = task_factors(loss, WEIGHT_K, totals, None)
    found = [coefficients(loss, text, factor_K[text.task]).tolist() for text in TEXTS]
    np.testing.assert_allclose(found, [*BY_HAND[loss], [0, 0, 0]], rtol=1e-15)


def test_an_epoch_divides_by_the_counts_of_the_pass():
    """A pass of 10 packs with all three tasks; the step has two of them, and a task without weight counts nowhere."""
    of_pass = Totals(10, np.array([30, 20, 10]), np.array([70.0, 10.0, 5.0]), np.array([30.0, 5.0, 5.0]))
    step = count(TEXTS, 2, 3)
    np.testing.assert_allclose(task_factors("task-token", WEIGHT_K, step, of_pass), [5 / 630, 5 * 3 / 90, 5 * 5 / 45])
    np.testing.assert_allclose(task_factors("token", WEIGHT_K, step, of_pass), np.full(3, 5 / 85))
    without = np.array([1.0, 3.0, 0.0])
    np.testing.assert_allclose(task_factors("task-sample", without, step, of_pass), [5 / 120, 5 * 3 / 20, 0])
    assert targets("task-token", WEIGHT_K, step, of_pass).tolist() == [1 / 9, 3 / 9, 5 / 9]
    assert targets("task-token", WEIGHT_K, step, None).tolist() == [1 / 4, 3 / 4, 0]
    assert targets("token", WEIGHT_K, step, None) is None


def test_stored_samples_are_counted_as_the_files_of_counts_say(split):
    counted, stored = count_pass(StoredSamples(split.dataset), split), split.totals
    np.testing.assert_array_equal(counted.tokens_K, stored.tokens_K)
    np.testing.assert_allclose(counted.token_weights_K, stored.token_weights_K, rtol=1e-12)
    np.testing.assert_allclose(counted.sample_weights_K, stored.sample_weights_K, rtol=1e-12)
    assert not np.allclose(counted.token_weights_K, counted.tokens_K)


@pytest.mark.parametrize(
    ("options", "of_data"),
    [
        ({}, (None, None, None)),
        ({}, (2.0, None, 0.5)),
        ({"task_weights": ("b=4", "a=0.5")}, (2.0, 3.0, 0.5)),
        ({"task_weights": ("[1, 2, 3]",)}, (None, None, None)),
        ({"mft_loss": "focal-sample", "focal_alpha": ("c=4",)}, (2.0, None, None)),
        ({"mft_loss": "token"}, (2.0, None, None)),
    ],
)
def test_weights_are_read_as_training_reads_them(options, of_data):
    arguments = MultiTaskArguments(**options)
    expected = initial_weights(arguments, ("a", "b", "c"), of_data)
    np.testing.assert_array_equal(asked_weights(arguments, ("a", "b", "c"), of_data), expected)


def problems(split, step_packs=8):
    return check_pass(split, 1, step_packs, split.dataset.entry.order_version).problems


def test_a_pass_uses_what_it_should(split):
    assert problems(split) == ()


def test_a_doubled_or_lost_sample_is_found(split):
    damaged = dataset_split(split)
    first, second = damaged._offsets[3], damaged._offsets[4]
    damaged._samples[first] = damaged._samples[second]  # in two packs; the other one in none
    task = split.dataset.tasks[split.dataset.task_ids[damaged._samples[first]]]
    assert [line.split(":")[0] for line in problems(damaged)][-1].startswith("task ")
    assert any(f"task {task}" in line and "2×" in line for line in problems(damaged))


def test_a_sample_twice_in_a_row_is_found(split):
    damaged = dataset_split(split)
    pack = next(pack for pack in range(damaged.num_packs) if len(damaged.slices_of(pack).samples) > 1)
    first = damaged._offsets[pack]
    damaged._samples[first + 1] = damaged._samples[first]
    said = f"pack {pack} holds sample {damaged._samples[first]} twice"
    assert any(line.startswith(said) for line in problems(damaged))


def dataset_split(split):
    """The same split in memory, to be damaged."""
    again = PackedDataset.open(split.dataset.prefix, LENGTH).split("train")
    again._samples = np.array(again._samples)
    return again


def test_a_pack_that_is_planned_twice_is_found(split, monkeypatch):
    plan_step = plan.plan_step

    def repeating(*arguments, consumed_samples, **options):
        return plan_step(*arguments, consumed_samples=max(consumed_samples - 1, 0), **options)

    monkeypatch.setattr(plan, "plan_step", repeating)
    assert split.num_packs > 2
    assert re.fullmatch(r"pack \d+ is used [02] times in a pass \(\d+ such packs\)", *problems(split, step_packs=2))


def piece(offset, rows, value=1.0, name="w"):
    return Piece(name, (4, 2), (offset, 0), torch.full((rows, 2), value))


def test_shards_are_put_together():
    whole = assembled([piece(2, 2, 3.0), piece(0, 2), piece(0, 2)])["w"]
    assert whole.value.tolist() == [[1, 1], [1, 1], [3, 3], [3, 3]]
    assert whole.disagreement == 0
    assert assembled([piece(0, 4), piece(0, 4, 1.5)])["w"].disagreement == 0.5
    assert assembled([piece(0, 4, 0.0), piece(0, 4, 1e-9)])["w"].disagreement > 1
    with pytest.raises(ValueError, match="4 of 8 elements"):
        assembled([piece(0, 2)])


def a_step(gradient, loss=2.0, disagreement=0.0, rows=3):
    padded = torch.zeros(rows, 2)
    padded[:3] = torch.tensor(gradient)
    gradients = {"embedding": Gradient(padded, disagreement)}
    return Step(loss, np.array([5, 0]), np.array([2.0, math.nan]), np.array([1.0, 0.0]), 1.0, gradients)


REFERENCE = a_step([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("step", "errors"),
    [
        (REFERENCE, {}),
        # other padding of the vocabulary, without a gradient and with one
        (a_step([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]], rows=6), {}),
        (a_step([[3.0, 0.0], [0.0, 4.0], [0.0, 0.1]], rows=6), {"embedding": 0.02}),
        (a_step([[3.0, 0.0], [0.0, 4.5], [0.0, 0.0]]), {"embedding": 0.1}),
        (a_step([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]], disagreement=0.25), {"embedding": 0.25}),
        (a_step([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]], loss=2.5), {"objective": 0.25}),
        (dataclasses.replace(REFERENCE, loss=math.nan), {"objective": math.nan}),
        (dataclasses.replace(REFERENCE, tokens_K=np.array([6, 0])), {"a": math.inf}),
        (dataclasses.replace(REFERENCE, share_K=np.array([0.75, 0.25])), {"a": 0.25, "b": 0.25}),
        (dataclasses.replace(REFERENCE, total=1.1), {"Σ c_t": 0.1}),
        (dataclasses.replace(REFERENCE, gradients={}), {"embedding": math.inf}),
        (
            dataclasses.replace(REFERENCE, gradients={"embedding": Gradient(torch.full((3, 2), math.nan))}),
            {"embedding": math.nan},
        ),
    ],
)
def test_what_differs_is_beyond_its_bound(step, errors):
    lines = compare(step, REFERENCE, REFERENCE.gradients, np.array([1.0, 0.0]), ["a", "b"], BOUNDS["fp32"])
    assert {line.name: line.error for line in lines if not line.holds} == pytest.approx(errors, nan_ok=True)


def test_a_loss_that_is_nan_on_both_sides_does_not_hold():
    step = dataclasses.replace(REFERENCE, loss=math.nan)
    lines = compare(step, step, step.gradients, np.array([1.0, 0.0]), ["a", "b"], BOUNDS["fp32"])
    assert [line.name for line in lines if not line.holds] == ["objective"]


@pytest.mark.parametrize(
    ("rounding", "error", "holds", "bound"),
    [
        (0.0, 4e-6, True, 5e-6),
        (1e-7, 6e-6, False, 5e-6),
        (1e-4, 4e-4, True, 5e-4),
        (1e-4, 6e-4, False, 5e-4),
        # not a number where the loss scale was too large
        (math.nan, 6e-6, False, 5e-6),
        # nothing is left of the gradient
        (0.2, 0.9, True, 1.0),
    ],
)
def test_a_gradient_may_differ_by_a_few_times_what_rounding_does(rounding, error, holds, bound):
    def off(by):
        return {"w": Gradient(torch.tensor([3.0, 4.0], dtype=torch.float64) * (1 + by))}

    step = dataclasses.replace(REFERENCE, gradients=off(error))
    line = compare(
        step, dataclasses.replace(REFERENCE, gradients=off(0)), off(rounding), None, ["a", "b"], BOUNDS["fp32"]
    )[-1]
    assert (line.holds, line.bound) == (holds, pytest.approx(bound))
    assert (note_of_zeros([line]) is not None) == (bound == 1.0)


@pytest.mark.parametrize(
    ("step", "failures", "word"),
    [
        (REFERENCE, [], None),
        (
            dataclasses.replace(REFERENCE, tokens_K=np.array([6, 0]), gradients={}),
            ["share a: supervised tokens are 6, not 5", "gradient embedding: only one side has it"],
            "c_t",
        ),
        (
            dataclasses.replace(REFERENCE, loss=2.5, gradients={}),
            ["loss objective: relative error 2.5e-01, bound 2.0e-06", "gradient embedding: only one side has it"],
            "attention",
        ),
        (dataclasses.replace(REFERENCE, gradients={}), ["gradient embedding: only one side has it"], "summed"),
    ],
)
def test_failures_say_what_to_look_at(step, failures, word):
    lines = compare(step, REFERENCE, REFERENCE.gradients, np.array([1.0, 0.0]), ["a", "b"], BOUNDS["fp32"])
    assert [line.failure for line in lines if not line.holds] == failures
    assert (hint(lines) is None) if word is None else (word in hint(lines))


def test_gradients_that_show_nothing_are_named():
    """Not one that is 0 in some steps alone."""

    def noted(*steps):
        made = [dataclasses.replace(REFERENCE, gradients={k: Gradient(v) for k, v in step.items()}) for step in steps]
        return note_of_zeros(
            [line for step in made for line in compare(step, step, step.gradients, None, ["a", "b"], BOUNDS["fp32"])]
        )

    zero, one = torch.zeros(2), torch.ones(2)
    assert noted({"fc1": one}) is None
    assert noted({"fc1": zero}, {"fc1": one}) is None
    said = "note: nothing is shown of gradients that are 0 on both sides or mere rounding: "
    assert noted({"fc1": zero, "fc2": zero, "qkv": one}) == f"{said}fc1, fc2"
    assert noted({"x.lora_a": zero, "y.lora_a": zero, "z.lora_a": zero, "z.lora_b": one}) == (
        f"{said}x.lora_a, y.lora_a and 1 more; LoRA's A has none while B is 0, certify a later checkpoint"
    )


def test_the_table_marks_what_is_beyond_its_bound():
    lines = [Line("loss", "objective", ("1.0", "2.0"), 0.5, 1e-6), Line("loss", "a", ("1.0", "1.0"), 0.0, 1e-6)]
    assert table(lines) == [
        "loss       computed  reference  rel. error",
        "objective       1.0        2.0     5.0e-01  MISMATCH: above 1.0e-06",
        "a               1.0        1.0     0.0e+00",
        "",
    ]
