"""Steps at which garbage is collected."""

import gc

import pytest

from mft_megatron.arguments.groups.training import TrainingArguments
from mft_megatron.training.garbage_collection import GarbageCollection


@pytest.fixture
def collected(monkeypatch):
    calls = []
    monkeypatch.setattr(gc, "collect", lambda generation=2: calls.append(generation))
    yield calls
    gc.enable()


def run(training, calls):
    with GarbageCollection(training) as garbage:
        enabled = gc.isenabled()
        for step in range(1, 5):
            with garbage.around_evaluation():
                calls.append("evaluation")
            garbage.after_step(step)
            calls.append(step)
    return enabled


def test_python_decides_without_the_option(collected):
    assert run(TrainingArguments(), collected)
    assert collected == ["evaluation", 1, "evaluation", 2, "evaluation", 3, "evaluation", 4]


def test_manual(collected):
    assert not run(TrainingArguments(manual_gc=True, manual_gc_interval=3), collected)
    around = [2, "evaluation", 0]
    assert collected == [2, *around, 1, *around, 2, *around, 2, 3, *around, 4]
    assert gc.isenabled()


def test_manual_but_not_around_evaluations(collected):
    run(TrainingArguments(manual_gc=True, manual_gc_eval=False), collected)
    assert collected == [2, "evaluation", 1, "evaluation", 2, "evaluation", 3, "evaluation", 4]
