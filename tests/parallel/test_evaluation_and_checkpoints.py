"""Evaluation and checkpoints do not depend on the layout either."""

import json
from pathlib import Path

import pytest
from ranks import run_on_ranks
from run import arguments_for, open_dataset, some_steps

TP2_PP2 = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
PP2_VPP2 = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"


def _evaluate(prefix, extra, world_size):
    import numpy as np

    from mft_megatron.mcore import parallel
    from mft_megatron.mcore.step import Trainer
    from mft_megatron.training.evaluation import evaluation_plans

    arguments = arguments_for(prefix, extra, world_size)
    dataset = open_dataset(arguments)
    split = dataset.split("valid")
    with parallel.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = Trainer(arguments, dataset.vocab_size, np.array([1.0, 2.0, 0.5, 3.0]))
        plans = list(evaluation_plans(arguments, split, limit=None))
        report = trainer.evaluate(split, plans)
        used = np.concatenate([plan.packs_G for plan in plans])
        return report.loss, report.loss_K.tolist(), report.tokens_K.tolist(), sorted(used[used >= 0].tolist())


@pytest.mark.parametrize(
    ("world_size", "extra"),
    [
        (1, "--micro-batch-size 1"),
        (2, "--micro-batch-size 4"),
        (2, "--micro-batch-size 1 --global-batch-size 2"),
        (4, f"{TP2_PP2} --micro-batch-size 1"),
        (2, f"{PP2_VPP2} --micro-batch-size 1 --global-batch-size 24 {DROPOUT}"),
    ],
)
@pytest.mark.parametrize("loss", ["task-token", "sample"])
def test_the_whole_split_exactly_once(dataset_prefix, world_size, extra, loss):
    expected = run_on_ranks(1, _evaluate, dataset_prefix, f"--micro-batch-size 8 --mft-loss {loss}", 1)[0]
    for result in run_on_ranks(world_size, _evaluate, dataset_prefix, f"{extra} --mft-loss {loss}", world_size):
        assert result[0] == pytest.approx(expected[0], rel=1e-6)
        assert result[1] == pytest.approx(expected[1], rel=1e-6)
        assert result[2:] == expected[2:]
    ledger = json.loads(Path(f"{dataset_prefix}_dataset.json").read_text())
    assert sum(expected[2]) == ledger["lengths"]["128"]["packs"]["valid"]["supervised_tokens"]
    assert expected[3] == list(range(ledger["lengths"]["128"]["packs"]["valid"]["packs"]))
    assert len(expected[3]) % 8 != 0  # or the filling up of the last batch would not be seen


@pytest.mark.parametrize(("world_size", "layout"), [(4, TP2_PP2), (2, PP2_VPP2)])
@pytest.mark.parametrize("precision", ["", "--bf16"])
def test_resuming_is_bit_equal(dataset_prefix, tmp_path, precision, world_size, layout):
    """Weights, optimizer, schedule and dropout go on as if nothing had happened."""
    options = f"{layout} {DROPOUT} {precision}"
    whole = run_on_ranks(world_size, some_steps, dataset_prefix, options, world_size, str(tmp_path), 3, 5, 1)[0]
    resumed = run_on_ranks(world_size, some_steps, dataset_prefix, options, world_size, str(tmp_path), None, 5, 77)[0]
    assert resumed == whole[3:]


@pytest.mark.parametrize(
    ("world_size", "extra"),
    [(1, ""), (2, "--tensor-model-parallel-size 2"), (2, "--pipeline-model-parallel-size 2"), (2, ""), (2, PP2_VPP2)],
)
@pytest.mark.parametrize("writer", [TP2_PP2, f"{PP2_VPP2} --micro-batch-size 1"])
def test_any_layout_loads_any_other(dataset_prefix, tmp_path, world_size, extra, writer):
    whole = run_on_ranks(4, some_steps, dataset_prefix, writer, 4, str(tmp_path), 3, 5, 1)[0]
    resumed = run_on_ranks(world_size, some_steps, dataset_prefix, extra, world_size, str(tmp_path), None, 5, 77)[0]
    for ours, theirs in zip(resumed, whole[3:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_the_command_lines_learning_rate_holds_after_a_load(dataset_prefix, tmp_path):
    whole = run_on_ranks(1, some_steps, dataset_prefix, "", 1, str(tmp_path), 3, 5, 1)[0]
    resumed = run_on_ranks(1, some_steps, dataset_prefix, "--lr 5e-4", 1, str(tmp_path), None, 5, 1)[0]
    assert [rate for _, _, rate in resumed] == pytest.approx([rate / 2 for _, _, rate in whole[3:]])


def _skip(prefix):
    """A step on a batch that supervises nothing of a weighted task."""
    import numpy as np

    from mft_megatron.data.step_plan import plan_step
    from mft_megatron.mcore import parallel
    from mft_megatron.mcore.step import Trainer

    arguments = arguments_for(prefix, "", 2)
    dataset = open_dataset(arguments)
    split = dataset.split("train")
    with parallel.process_groups(arguments.distributed, 1):
        trainer = Trainer(arguments, dataset.vocab_size, np.array([0.0, 0.0, 0.0, 1.0]))
        before = [parameter.detach().clone() for parameter in trainer.chunks[0].parameters()]
        only_others = next(
            plan
            for seed in range(500)
            if (plan := plan_step(split, seed=seed, global_batch_size=4, consumed_samples=0)).supervised_tokens_K[3]
            == 0
        )
        report = trainer.train_step(split, only_others)
        same = all(a.equal(b) for a, b in zip(before, trainer.chunks[0].parameters(), strict=True))
        return report, same, trainer.scheduler.num_steps


def test_a_batch_with_nothing_to_learn_changes_nothing(dataset_prefix):
    assert run_on_ranks(2, _skip, dataset_prefix) == [(None, True, 0)] * 2


def test_a_checkpoint_fills_a_model_with_more_padding(dataset_prefix, tmp_path):
    """Through --load, so that the weights hold anything before; rows that the checkpoint lacks must become numbers."""
    whole = run_on_ranks(1, some_steps, dataset_prefix, "", 1, str(tmp_path), 3, 5, 1)[0]
    options = f"--load {tmp_path} --make-vocab-size-divisible-by 1024 --tensor-model-parallel-size 2"
    resumed = run_on_ranks(2, some_steps, dataset_prefix, options, 2, str(tmp_path), None, 5, 1)[0]
    for ours, theirs in zip(resumed, whole[3:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
