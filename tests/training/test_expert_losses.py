"""Losses of a mixture of experts in the log; and data sets that experts on several ranks cannot train on."""

import dataclasses
import json
import types

import numpy as np
import pytest
import torch

from mft_megatron.batch import StepPlan
from mft_megatron.errors import InputError
from mft_megatron.losses.table import LOSSES as LOSS_TABLE
from mft_megatron.mcore.trainer import StepReport
from mft_megatron.training import pretrain
from mft_megatron.training.progress import Progress
from mft_megatron.training.records import train_record
from mft_megatron.training.run_log import RunLog
from mft_megatron.training.shares.account import RunShares
from tests.task_counts import counted

NAN = float("nan")
PLAN = StepPlan(np.arange(2), counted([4], [2]), np.zeros(2, np.int64), np.ones(2, np.int64))


def record(losses, each_layer=False):
    sums = [torch.tensor([value], dtype=torch.float64) for value in (6.0, 4.0, 4.0, 1.5, 1.0)]
    report = StepReport(*sums, weight_K=np.ones(1), grad_norm=0.5, learning_rate=1e-3)
    losses = {name: torch.tensor(values, dtype=torch.float64) for name, values in losses.items()}
    report = dataclasses.replace(report, expert_losses=losses)
    shares = RunShares(1, 2, np.ones(1), np.ones(1), np.ones(1), np.zeros(1), ("global",))
    loss = LOSS_TABLE["task-token"]
    return train_record(Progress(1, 2), report, PLAN, 8, 0.5, 0.0, ["only"], loss, shares, each_layer)


LOSSES = {"load_balancing_loss": [NAN, 1.5, NAN, 2.5], "z_loss": [NAN, 3.0, NAN, 5.0]}


def test_means_over_layers_with_experts():
    assert record(LOSSES)["moe"] == {"load_balancing_loss": 2.0, "z_loss": 4.0}
    assert "moe" not in record({})


def test_each_layer_by_its_number():
    assert record(LOSSES, each_layer=True)["moe"] == {
        "load_balancing_loss": 2.0,
        "z_loss": 4.0,
        "layers": {
            "2": {"load_balancing_loss": 1.5, "z_loss": 3.0},
            "4": {"load_balancing_loss": 2.5, "z_loss": 5.0},
        },
    }


def test_where_records_go(tmp_path, monkeypatch):
    scalars = {}
    board = types.SimpleNamespace(
        add_scalar=lambda name, value, step: scalars.update({name: value}), close=lambda: None
    )
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", lambda folder, **options: board)
    log = RunLog(True, str(tmp_path))
    log.write(record(LOSSES, each_layer=True))
    log.write_scalars(record(LOSSES, each_layer=True))
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["moe"]["z_loss"] == 4.0
    assert scalars["train-moe/z_loss"] == 4.0
    assert scalars["train-moe-load_balancing_loss/layer 4"] == 2.5
    assert all(isinstance(value, int | float) for value in scalars.values())


@pytest.mark.parametrize(
    ("padded", "ranks", "dispatcher", "refused"),
    [
        (True, 2, "allgather", True),
        (True, 2, "alltoall", False),
        (True, 1, "allgather", False),
        (False, 2, "allgather", False),
    ],
)
def test_ranks_with_different_numbers_of_tokens(padded, ranks, dispatcher, refused):
    arguments = types.SimpleNamespace(
        distributed=types.SimpleNamespace(expert_model_parallel_size=ranks),
        moe=types.SimpleNamespace(moe_token_dispatcher_type=dispatcher),
        data=types.SimpleNamespace(data_path="some/set"),
    )
    dataset = types.SimpleNamespace(padded=padded)
    if not refused:
        pretrain._refuse_uneven_gathering(arguments, dataset)
        return
    with pytest.raises(InputError, match=r"rows of some/set are padded.*use alltoall"):
        pretrain._refuse_uneven_gathering(arguments, dataset)
