"""Evaluation and checkpoints do not depend on the parallel layout."""

import functools
import json
from pathlib import Path

import pytest

from tests.parallel.run import TASK_WEIGHTS, arguments_for, open_dataset, some_steps
from tests.ranks import run_on_ranks

TP2_PP2 = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
PP2_VPP2 = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
EVALUATED = ("task-token", "sample")


def _evaluate(prefix, extra, world_size):
    """Evaluate the whole validation split with each loss; return the reports and the packs that were used."""
    import numpy as np

    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer
    from mft_megatron.training.evaluation import evaluation_plans

    arguments = arguments_for(prefix, extra, world_size)
    dataset, reports = open_dataset(arguments), {}
    split = dataset.split("valid")
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        for loss in EVALUATED:
            arguments = arguments_for(prefix, f"{extra} --mft-loss {loss}", world_size)
            trainer = Trainer(arguments, dataset.vocab_size, 4)
            plans = list(evaluation_plans(arguments, split, limit=None))
            report = trainer.evaluate(split, plans, TASK_WEIGHTS)
            used = np.concatenate([plan.packs_G for plan in plans])
            numbers = report.loss, report.loss_K.tolist(), report.tokens_K.tolist()
            reports[loss] = *numbers, sorted(used[used >= 0].tolist())
    return reports


@functools.cache
def evaluated_by_one_process(prefix):
    return run_on_ranks(1, _evaluate, prefix, "--micro-batch-size 8", 1)[0]


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
def test_the_whole_split_exactly_once(dataset_prefix, world_size, extra):
    results = run_on_ranks(world_size, _evaluate, dataset_prefix, extra, world_size)
    packs = json.loads(Path(f"{dataset_prefix}_dataset.json").read_text())["lengths"]["128"]["packs"]["valid"]
    for loss, expected in evaluated_by_one_process(dataset_prefix).items():
        for result in (of_rank[loss] for of_rank in results):
            assert result[0] == pytest.approx(expected[0], rel=1e-6), loss
            assert result[1] == pytest.approx(expected[1], rel=1e-6), loss
            assert result[2:] == expected[2:], loss
        assert sum(expected[2]) == packs["supervised_tokens"]
        assert expected[3] == list(range(packs["packs"]))
        assert len(expected[3]) % 8 != 0  # otherwise empty rows in the last batch would not be tested
    token, sample = (evaluated_by_one_process(dataset_prefix)[loss][0] for loss in EVALUATED)
    assert token != pytest.approx(sample, rel=1e-4)  # the two losses differ


@pytest.mark.parametrize(("world_size", "layout"), [(4, TP2_PP2), (2, PP2_VPP2)])
@pytest.mark.parametrize("precision", ["", "--bf16"])
def test_resuming_is_bit_equal(dataset_prefix, tmp_path, precision, world_size, layout):
    """Weights, optimizer, schedule and dropout continue as in an uninterrupted run."""
    options = f"{layout} {DROPOUT} {precision}"
    whole = run_on_ranks(world_size, some_steps, dataset_prefix, options, world_size, str(tmp_path), 3, 5, 1)[0]
    resumed = run_on_ranks(world_size, some_steps, dataset_prefix, options, world_size, str(tmp_path), None, 5, 77)[0]
    assert resumed == whole[3:]


@pytest.fixture(scope="module")
def saved(dataset_prefix, tmp_path_factory):
    """Train five steps on a parallel layout, once, and save after the third: the folder and the steps' records."""

    @functools.cache
    def train(world_size, options):
        folder = str(tmp_path_factory.mktemp("saved"))
        return folder, run_on_ranks(world_size, some_steps, dataset_prefix, options, world_size, folder, 3, 5, 1)[0]

    return train


@pytest.mark.parametrize(
    ("world_size", "extra"),
    [(1, ""), (2, "--tensor-model-parallel-size 2"), (2, "--pipeline-model-parallel-size 2"), (2, ""), (2, PP2_VPP2)],
)
@pytest.mark.parametrize("writer", [TP2_PP2, f"{PP2_VPP2} --micro-batch-size 1"])
def test_any_layout_loads_any_other(dataset_prefix, saved, world_size, extra, writer):
    folder, whole = saved(4, writer)
    resumed = run_on_ranks(world_size, some_steps, dataset_prefix, extra, world_size, folder, None, 5, 77)[0]
    for ours, theirs in zip(resumed, whole[3:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_the_command_lines_learning_rate_holds_after_a_load(dataset_prefix, saved):
    folder, whole = saved(1, "")
    resumed = run_on_ranks(1, some_steps, dataset_prefix, "--lr 5e-4", 1, folder, None, 5, 1)[0]
    assert [rate for _, _, rate in resumed] == pytest.approx([rate / 2 for _, _, rate in whole[3:]])


def test_without_the_optimizer_the_schedule_continues(dataset_prefix, saved):
    """The states are fresh, and the rate still ends where that of the uninterrupted run does."""
    folder, whole = saved(1, "")
    resumed = run_on_ranks(1, some_steps, dataset_prefix, "--no-load-optim", 1, folder, None, 5, 1)[0]
    assert resumed[0] == pytest.approx(whole[3], rel=1e-6)
    assert resumed[1][0] != pytest.approx(whole[4][0], rel=1e-6)
    assert [rate for _, _, rate in resumed] == [rate for _, _, rate in whole[3:]]


def _skip(prefix):
    """Train a step on a batch that supervises no token of a weighted task."""
    import numpy as np

    from mft_megatron.data.loading.step_plan import plan_step
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer

    arguments = arguments_for(prefix, "", 2)
    dataset = open_dataset(arguments)
    split = dataset.split("train")
    with process_groups.process_groups(arguments.distributed, 1):
        trainer = Trainer(arguments, dataset.vocab_size, 4)
        before = [parameter.detach().clone() for parameter in trainer.chunks[0].parameters()]
        only_others = next(
            plan
            for seed in range(500)
            if (plan := plan_step(split, seed=seed, global_batch_size=4, consumed_samples=0)).counts.tokens_K[3] == 0
        )
        report = trainer.train_step(split, only_others, np.array([0.0, 0.0, 0.0, 1.0]))
        same = all(a.equal(b) for a, b in zip(before, trainer.chunks[0].parameters(), strict=True))
        return report, same, trainer.scheduler.num_steps


def test_a_batch_with_nothing_to_learn_changes_nothing(dataset_prefix):
    assert run_on_ranks(2, _skip, dataset_prefix) == [(None, True, 0)] * 2


def test_a_checkpoint_fills_a_model_with_more_padding(dataset_prefix, saved):
    """With --load weights are uninitialised before; rows that the checkpoint lacks must become finite."""
    folder, whole = saved(1, "")
    options = f"--load {folder} --make-vocab-size-divisible-by 1024 --tensor-model-parallel-size 2"
    resumed = run_on_ranks(2, some_steps, dataset_prefix, options, 2, folder, None, 5, 1)[0]
    for ours, theirs in zip(resumed, whole[3:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
