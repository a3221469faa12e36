"""Consequences of validation losses, before the first step and after a restart."""

import numpy as np
import pytest

from mft_megatron.arguments.command import parse_arguments
from mft_megatron.data.loading.dataset import PackedDataset
from mft_megatron.errors import InputError
from mft_megatron.training import evaluation
from mft_megatron.training.evaluation import Evaluation
from mft_megatron.training.progress import Progress

MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --micro-batch-size 1 --train-iters 9 --lr 1"


class Log:
    def __init__(self):
        self.records = []

    def write(self, record):
        self.records.append(record)


def evaluation_for(prefix, extra):
    arguments = parse_arguments(f"{MODEL} --data-path {prefix} --seq-length 128 {extra}".split())
    return Evaluation(arguments, PackedDataset.open(prefix, 128))


def test_no_task_to_train_is_refused(dataset_prefix, monkeypatch):
    monkeypatch.setattr(evaluation, "_counts", lambda split: np.array([0, 5, 0, 0]))
    evaluation_for(dataset_prefix, "")
    with pytest.raises(InputError, match="no task with a weight has a supervised token in the training split"):
        evaluation_for(dataset_prefix, "--task-weights explain=0")


def test_a_task_that_evaluations_do_not_see_is_no_metric(dataset_prefix, monkeypatch):
    words = "--early-stopping-patience 1 --early-stopping-metric"
    tasks = PackedDataset.open(dataset_prefix, 128).tasks
    evaluation_for(dataset_prefix, f"{words} {tasks[0]}")
    plans = evaluation.evaluation_plans

    def without_the_first(arguments, split, limit):
        for plan in plans(arguments, split, limit):
            plan.counts.tokens_K[0] = 0
            yield plan

    monkeypatch.setattr(evaluation, "evaluation_plans", without_the_first)
    with pytest.raises(InputError, match=f"{tasks[0]}: evaluations see no sample of this task"):
        evaluation_for(dataset_prefix, f"{words} {tasks[0]}")


def valid(step, losses):
    tasks = {name: {"loss": loss} for name, loss in losses.items()}
    return {"step": step, "loss": 1.0, "macro_loss": np.mean(list(losses.values())), "tasks": tasks}


def test_a_restart_with_other_options_says_what_changes(dataset_prefix):
    first = evaluation_for(dataset_prefix, "--task-early-stopping-patience 1 --early-stopping-patience 9")
    for step in (1, 2):
        record = valid(step, {name: 1.0 for name in PackedDataset.open(dataset_prefix, 128).tasks})
        first._state, _ = first._stopping.after_evaluation(first._state, record)
    state = {"stopping": first.state()["stopping"]}

    same, log = evaluation_for(dataset_prefix, "--task-early-stopping-patience 1 --early-stopping-patience 9"), Log()
    same.load(state, log, Progress(2))
    assert log.records == []
    assert same.finished == "every task has stopped (--task-early-stopping-patience 1)"

    other = evaluation_for(dataset_prefix, "--early-stopping-patience 9 --early-stopping-metric write")
    other.load(state, log, Progress(2))
    reasons = [record["reason"] for record in log.records]
    assert (
        "completion, explain, write, read: trained again, as --task-early-stopping-patience is None now" in reasons[0]
    )
    assert reasons[1] == "the search for the best starts again, by write; so far it was by macro"
    assert other.finished is None


def test_another_balancer_than_the_checkpoints_starts_from_its_beginning(dataset_prefix):
    coba, log = evaluation_for(dataset_prefix, "--task-balance coba"), Log()
    coba.load({"balance": evaluation_for(dataset_prefix, "").balance.state()}, log, Progress(7))
    assert "--task-balance coba starts from its beginning: the weights so far were static" in log.records[0]["reason"]
    assert coba.balance.needs_first_losses
    static = evaluation_for(dataset_prefix, "")
    static.load({"balance": coba.balance.state()}, log, Progress(7))
    assert "--task-balance static starts from its beginning: the weights so far were coba" in log.records[1]["reason"]
