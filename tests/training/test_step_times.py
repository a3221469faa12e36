"""Step times: the host waits for the device only where other work follows a step, and no time of the device is lost."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mft_megatron.batch import StepPlan
from mft_megatron.mcore.platform import devices
from mft_megatron.mcore.trainer import StepReport
from mft_megatron.training.loop import StepLogger, _other_work_follows
from mft_megatron.training.progress import Progress
from tests.task_counts import counted

PLAN = StepPlan(np.arange(2), counted([4], [2]), np.zeros(2, np.int64), np.ones(2, np.int64))
REPORT = StepReport(*torch.ones(5, 1), weight_K=np.ones(1), learning_rate=1e-3)


class Machine:
    """A clock, and a device that computes 3 s of each step while the host needs 1 s to launch it."""

    def __init__(self, monkeypatch):
        self.now, self.busy_until, self.waits = 0.0, 0.0, 0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(devices, "synchronize", self.wait)

    def step(self):
        self.busy_until = max(self.busy_until, self.now) + 3
        self.now += 1

    def wait(self):
        self.waits += 1
        self.now = max(self.now, self.busy_until)


def arguments_with(log=4, scalars=None, evaluate=1000, save=None, last=100):
    return SimpleNamespace(
        logging=SimpleNamespace(log_interval=log, tensorboard_log_interval=scalars),
        validation=SimpleNamespace(eval_interval=evaluate),
        checkpoint=SimpleNamespace(save_interval=save),
        training=SimpleNamespace(train_iters=last),
    )


def test_only_a_logged_step_waits_and_the_mean_is_that_of_the_device(monkeypatch):
    machine = Machine(monkeypatch)
    logger = StepLogger(arguments_with(), None, None, None, None)
    monkeypatch.setattr(logger, "_record", lambda *newest: times.append(logger._clock.read()))
    logger._log, times = SimpleNamespace(write=lambda record: None, write_scalars=lambda *records: None), []
    monkeypatch.setattr(logger, "_machine_scalars", dict)
    for step in range(1, 9):
        machine.step()
        follows = _other_work_follows(logger._arguments, SimpleNamespace(draws_after=lambda step: False), step)
        logger.count(Progress(step, 2 * step), PLAN, REPORT, follows)
        logger.write(Progress(step, 2 * step), last=False)
        logger.exclude_time()
    assert machine.waits == 2
    assert times == [(3.0, 0.0), (3.0, 0.0)]


def test_a_skipped_step_does_not_wait_and_the_next_one_is_logged_for_it(monkeypatch):
    machine = Machine(monkeypatch)
    logger = StepLogger(arguments_with(log=1), None, None, None, SimpleNamespace(write=lambda record: None))
    logger.count(Progress(1, 2), PLAN, None, followed=True)
    logger.write(Progress(1, 2), last=False)
    assert machine.waits == 0
    machine.step()
    logger.count(Progress(2, 4), PLAN, REPORT, followed=False)
    assert machine.waits == 1


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [4, 8]),
        ({"scalars": 3}, [3, 4, 6, 8, 9]),
        ({"log": 5, "evaluate": 6, "save": 7}, [5, 6, 7]),
        ({"log": 50, "last": 2}, [2]),
        ({"log": 50, "draws": 3}, [3, 6, 9]),
    ],
)
def test_steps_that_other_work_follows(options, steps):
    every = options.pop("draws", 1000)
    balance = SimpleNamespace(draws_after=lambda step: step % every == 0)
    arguments = arguments_with(**options)
    assert [step for step in range(1, 10) if _other_work_follows(arguments, balance, step)] == steps
