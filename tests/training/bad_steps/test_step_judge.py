"""The judge of steps: what is not finite, what jumps, and what it remembers."""

import dataclasses
import math

import numpy as np
import pytest

from mft_megatron.arguments.groups.bad_steps import BadStepArguments
from mft_megatron.mcore.optim.guarded_step import StepNumbers
from mft_megatron.training.bad_steps.step_judge import StepJudge

GOOD = StepNumbers(1.0, 2.0, np.array([10.0, 0.0, 30.0]), np.array([10.0, 0.0, 20.0]))
SPIKES = BadStepArguments(loss_spike_factor=6.0, loss_spike_window=16)


def judge(options=SPIKES):
    return StepJudge(options, ("code", "chat", "math"))


def changed(**more):
    return dataclasses.replace(GOOD, **more)


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        (GOOD, None),
        (changed(loss=math.nan), "the loss is nan"),
        (changed(grad_norm=math.inf), "the gradient norm is inf"),
        (changed(loss_K=np.array([10.0, 0.0, math.nan])), "the loss of task math is nan"),
        (changed(loss_K=np.array([math.inf, 0.0, 1.0])), "the loss of task code is inf"),
        # a task without supervised tokens has no loss, unless its tokens gave NaN
        (changed(loss_K=np.array([10.0, math.nan, 30.0])), "the loss of task chat is nan"),
    ],
)
@pytest.mark.parametrize("options", [SPIKES, BadStepArguments()])
def test_what_is_not_finite_is_bad_from_the_first_step(numbers, reason, options):
    assert judge(options)(numbers) == reason


def trained(steps=16, options=SPIKES):
    """A judge that has accepted some steps, whose numbers vary by a few per cent."""
    one = judge(options)
    for step in range(steps):
        factor = 1 + 0.02 * (step % 5)
        assert one(changed(loss=factor, grad_norm=2 * factor, loss_K=GOOD.loss_K * factor)) is None
        one.accept()
    return one


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        (changed(loss=1.1), None),
        (changed(loss=1.5), "the loss is 1.5, "),
        (changed(loss=0.1), None),
        (changed(grad_norm=2.2), None),
        (changed(grad_norm=20.0), "the gradient norm is 20, "),
        (changed(loss_K=np.array([10.0, 0.0, 90.0])), "the loss of task math is 4.5, "),
        # never seen before, so there is nothing to compare with
        (changed(loss_K=np.array([10.0, 99.0, 30.0]), token_weights_K=np.array([10.0, 1.0, 20.0])), None),
        # the largest jump is named
        (changed(loss=2.0, loss_K=np.array([10.0, 0.0, 900.0])), "the loss of task math is 45, "),
    ],
)
def test_jumps_of_a_loss_of_a_task_and_of_the_norm_are_bad(numbers, reason):
    found = trained()(numbers)
    assert (found is None) == (reason is None)
    if reason is not None:
        assert found.startswith(reason)
        assert found.endswith(" (--loss-spike-factor 6)")
    assert trained(options=BadStepArguments())(numbers) is None


def test_a_quarter_of_the_window_must_be_known():
    assert trained(steps=3)(changed(loss=50.0)) is None
    assert trained(steps=4)(changed(loss=50.0)) is not None


def test_a_bad_step_does_not_enter_the_window_and_a_new_level_stays_bad():
    one = trained()
    for _ in range(40):
        assert one(changed(loss=1.5)) is not None
    assert one(GOOD) is None


def test_a_resumed_judge_judges_alike_and_other_tasks_start_anew():
    one, other = trained(), judge()
    other.load(one.state())
    assert other(changed(loss=1.5)) == one(changed(loss=1.5))
    renamed = StepJudge(SPIKES, ("code", "chat", "law"))
    renamed.load(one.state())
    assert renamed(changed(loss=1.5)) is None
