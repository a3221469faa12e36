"""Records of metrics.jsonl from sums made by hand."""

import dataclasses
import json
import sys
import types

import numpy as np
import pytest
import torch

from mft_megatron.arguments.groups.logging import LoggingArguments
from mft_megatron.batch import StepPlan
from mft_megatron.errors import InputError
from mft_megatron.losses.table import LOSSES
from mft_megatron.mcore.trainer import StepReport
from mft_megatron.training.events import event_record
from mft_megatron.training.progress import Progress
from mft_megatron.training.records import train_record, valid_record
from mft_megatron.training.run_log import RunLog, _line
from mft_megatron.training.shares.account import RunShares
from tests.task_counts import counted

TASKS = ("write", "explain", "absent")


def report():
    sums = ([6.0, 9.0, 0.0], [2.0, 3.0, 0.0], [2.0, 3.0, 0.0], [1.0, 2.0, 0.0], [0.25, 0.75, 0.0])
    rows = [torch.tensor(row, dtype=torch.float64) for row in sums]
    return StepReport(*rows, weight_K=np.array([1.0, 3.0, 5.0]), grad_norm=0.5, learning_rate=1e-3)


# 28 packs, of which the account gives the tasks 6.3, 21.7 and 0 for 7, 21 and 0
SHARES = RunShares(
    7, 28, np.array([6.3, 21.7, 0]), np.array([7.0, 21, 0]), np.full(3, 7), np.zeros(3, np.int64), ("global",)
)


def step_record(report, plan, loss="task-token", shares=SHARES):
    return train_record(
        Progress(7, 28),
        report,
        plan,
        50,
        step_time=0.5,
        balance_time=0.125,
        task_names=TASKS,
        loss=LOSSES[loss],
        shares=shares,
    )


def plan(tokens=(2, 3, 0)):
    return StepPlan(np.arange(4), counted(tokens, [1, 2, 0]), np.zeros(4, np.int64), np.ones(4, np.int64))


def test_a_step():
    record = step_record(report(), plan())
    assert (record["loss"], record["step"], record["consumed_samples"]) == (3.0, 7, 28)
    assert (record["tokens"], record["supervised_tokens"]) == (50, 5)
    assert record["global_batch_size"] == 4
    assert record["tasks"]["write"] == {
        "loss": 3.0,
        "supervised_tokens": 2,
        "samples": 1,
        "weight": 1.0,
        "target_share": 0.25,
        "share": 0.25,
        "run_share": 0.225,
        "run_target_share": 0.25,
    }
    assert record["mean_loss"] == 3.0
    assert (record["balance_time"], record["balance_share"]) == (0.125, 0.2)
    assert record["tasks"]["explain"]["target_share"] == 0.75
    unweighted = step_record(report(), plan(), "token")["tasks"]["explain"]
    assert (unweighted["target_share"], unweighted["run_target_share"]) == (None, None)
    assert unweighted["run_share"] == pytest.approx(0.775)
    assert record["tasks"]["absent"]["loss"] is None
    assert record["tasks"]["absent"]["share"] == 0.0


def test_the_mean_loss_is_of_one_unit_of_the_objective():
    """Under epoch normalisation Σ c_t of a step is not 1."""
    half = dataclasses.replace(report(), share_K=torch.tensor([0.125, 0.375, 0.0], dtype=torch.float64))
    record = step_record(half, plan())
    assert (record["loss"], record["mean_loss"]) == (3.0, 6.0)
    assert "mean_loss" not in step_record(half, plan(), "focal-task")
    assert "| loss 3.0000 (mean 6.0000) | grad norm" in _line(record)
    assert "| loss 3.0000 | grad norm" in _line(step_record(half, plan(), "focal-sample"))


def test_the_terminal_shows_shares_of_the_run_and_targets_that_are_missed():
    line = _line(step_record(report(), plan()))
    assert line.endswith("| write 3.0000 (22.5% for 25.0%), explain 3.0000 (77.5%), absent – (0.0%)")
    before = dataclasses.replace(SHARES, realised_K=np.zeros(3), target_K=np.zeros(3))
    assert _line(step_record(report(), plan(), shares=before)).endswith("| write 3.0000, explain 3.0000, absent –")


def test_counts_that_differ_from_the_plan_stop_the_run():
    with pytest.raises(RuntimeError, match=r"\[2, 3, 0\], the data set's index says \[2, 4, 0\]"):
        step_record(report(), plan((2, 4, 0)))


def weighted(token_weights):
    report_ = report()
    return dataclasses.replace(report_, token_weights_K=torch.tensor(token_weights, dtype=torch.float64))


def test_losses_of_weighted_tokens_are_means_by_weight():
    counts = plan().counts._replace(token_weights_K=np.array([1.5, 4.5, 0.0]))
    ours = dataclasses.replace(plan(), counts=counts)
    record = step_record(weighted([1.5 * (1 + 1e-12), 4.5, 0.0]), ours)
    assert record["tasks"]["write"]["loss"] == pytest.approx(4.0)
    assert record["tasks"]["explain"]["loss"] == 2.0
    assert (record["tasks"]["write"]["supervised_tokens"], record["supervised_tokens"]) == (2, 5)
    evaluation = valid_record(Progress(7, 28), weighted([1.5, 4.5, 0.0]), TASKS)
    assert (evaluation["tasks"]["write"]["loss"], evaluation["token_loss"], evaluation["macro_loss"]) == (4.0, 2.5, 3.0)
    with pytest.raises(RuntimeError, match="weights of supervised tokens per task are"):
        step_record(weighted([1.5, 4.5 + 1e-6, 0.0]), ours)


def test_an_evaluation():
    record = valid_record(Progress(7, 28), report(), TASKS)
    assert (record["loss"], record["token_loss"], record["macro_loss"]) == (3.0, 3.0, 3.0)
    assert record["tasks"]["explain"]["perplexity"] == pytest.approx(20.0855369)
    assert record["tasks"]["absent"] == {"loss": None, "perplexity": None, "supervised_tokens": 0}


def test_records_go_to_file_board_and_terminal(tmp_path, capsys):
    log = RunLog(True, str(tmp_path), None)
    written = [
        step_record(report(), plan()),
        valid_record(Progress(7, 28), report(), TASKS),
        event_record(Progress(7, 28), "skip", reason="why"),
    ]
    for record in written:
        log.write(record)
    log.write_scalars(written[0])
    log.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == written
    assert list((tmp_path / "tensorboard").iterdir())
    said = capsys.readouterr().out
    assert "step 7 | loss 3.0000 | grad norm 0.5000 | lr 0.001 | 100 tokens/s | write 3.0000" in said
    assert "absent –" in said
    assert "step 7 | skip | reason why" in said


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = RunLog(False, str(tmp_path / "run"), LoggingArguments(tensorboard_dir=str(tmp_path / "board")))
    log.write(event_record(Progress(), "skip", reason="why"))
    log.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_weights_and_biases_get_the_same_scalars(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, scalars, step):
            calls.append((step, scalars))

        def finish(self):
            calls.append("finished")

    fake = types.ModuleType("wandb")
    fake.init = lambda **options: calls.append(options) or Run()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = RunLog(True, str(tmp_path / "run"), LoggingArguments(wandb_project="project"))
    log.write(valid_record(Progress(7, 28), report(), TASKS))
    log.write(event_record(Progress(7, 28), "skip", reason="why"))
    log.close()
    assert calls[0] == {"project": "project", "entity": None, "name": "run", "dir": str(tmp_path / "run")}
    assert calls[1][0] == 7
    assert calls[1][1]["valid/loss"] == calls[1][1]["valid-loss/write"] == 3.0
    assert calls[2:] == ["finished"]


def test_weights_and_biases_know_the_team_and_the_folder(tmp_path, monkeypatch):
    calls = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: calls.append(options)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    RunLog(True, None, LoggingArguments(wandb_project="p", wandb_entity="us", wandb_save_dir="d", wandb_exp_name="n"))
    assert calls == [{"project": "p", "entity": "us", "name": "n", "dir": "d"}]


def test_wandb_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="wandb is not installed"):
        RunLog(True, None, LoggingArguments(wandb_project="project"))


def test_progress_counts_packs():
    progress = Progress().after_step(8, skipped=False).after_step(8, skipped=True)
    assert progress == Progress(step=2, consumed_samples=16, skipped_steps=1)
