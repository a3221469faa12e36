"""Balanced runs do not depend on the parallel layout, and resume from a checkpoint bit for bit.

The runs use the training loop with a log that keeps all records: task losses of every validation draw, weights, losses
and gradient norms of every step, on every rank.
"""

import functools
from pathlib import Path

import numpy as np
import pytest

from tests.parallel.run import arguments_for, open_dataset
from tests.ranks import run_on_ranks

COBA = "--coba-warmup-steps 2 --coba-history-length 3 --coba-sample-valid-num 7"
BALANCERS = {
    "self-paced": (
        "--task-balance self-paced --self-paced-history-length 3 --self-paced-sample-valid-num 7 "
        "--mft-normalization epoch"
    ),
    "famo": "--task-balance famo --famo-sample-valid-num 7 --mft-loss task-sample",
    "coba": f"--task-balance coba {COBA}",
    "coba-release": f"--task-balance coba {COBA} --coba-variant release",
}
STEPS = "--train-iters 6 --log-interval 1"
LAYOUTS = {
    "TP2": (2, "--tensor-model-parallel-size 2 --micro-batch-size 8"),
    "PP2": (2, "--pipeline-model-parallel-size 2 --micro-batch-size 2"),
    "PP2 VPP2": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --micro-batch-size 4"),
    "DP2": (2, "--micro-batch-size 2"),
}
# Absolute. The losses of a draw may differ by 1e-6; 3e-8 was measured. Their slopes are a hundredth of them; self-paced
# has a gain of 50 before its softmax, CoBa one of 4, the number of tasks; FAMO takes logarithms. Measured: 2e-6, 2e-7,
# 2e-8.
WEIGHT_TOLERANCES = {"self-paced": 1e-4, "famo": 1e-6, "coba": 1e-5, "coba-release": 1e-5}


class Log:
    """A log that keeps all records, on every rank."""

    def __init__(self):
        self.records = []

    def write(self, record):
        self.records.append(record)

    def write_scalars(self, record, others):
        pass

    def print(self, text):
        pass

    def of_kind(self, kind):
        return [record for record in self.records if record["kind"] == kind]

    def events(self, name):
        return [record for record in self.of_kind("event") if record["event"] == name]


def _run(prefix, extra, world_size, rising=None):
    """Run as pretrain_mft.py does, in existing process groups, and return the log and the validation draws.

    Args:
        rising: index of a task whose validation losses are reported as rising.
    """
    import dataclasses

    import torch

    from mft_megatron.mcore.trainer import Trainer
    from mft_megatron.training.bad_steps.bad_steps import BadSteps
    from mft_megatron.training.epochs import EpochProof
    from mft_megatron.training.evaluation import Evaluation
    from mft_megatron.training.loop import train
    from mft_megatron.training.saving.resume import resume
    from mft_megatron.training.saving.saver import Saver
    from mft_megatron.training.shares.share_log import ShareLog

    arguments = arguments_for(prefix, f"{STEPS} {extra}", world_size)
    dataset = open_dataset(arguments)
    evaluation, log, draws = Evaluation(arguments, dataset), Log(), []
    trainer = Trainer(arguments, dataset.vocab_size, len(dataset.tasks))
    task_losses, evaluate = trainer.task_losses, trainer.evaluate

    def keep(dataset, rows):
        loss_K = task_losses(dataset, rows)
        draws.append((len(rows), loss_K))
        return loss_K

    def worse(split, plans, weight_K):
        report = evaluate(split, plans, weight_K)
        factor_K = torch.ones(split.num_tasks, dtype=torch.float64)
        factor_K[rising] += len(log.of_kind("valid"))
        return dataclasses.replace(report, loss_K=report.loss_K * factor_K)

    trainer.task_losses = keep
    trainer.evaluate = evaluate if rising is None else worse
    progress, state = resume(arguments, trainer, log)
    epochs, shares = EpochProof(arguments, dataset), ShareLog(arguments, dataset)
    for part in (evaluation, epochs, shares):
        part.load(state, log, progress)
    saver = Saver(arguments, dataset)
    bad_steps = BadSteps(arguments, dataset, saver.of_this_run)
    bad_steps.load(state, log, progress)
    train(arguments, dataset, trainer, evaluation, epochs, shares, bad_steps, saver, log, progress)
    return log, draws


def _runs(prefix, layout, world_size, runs, **options):
    """Return logs and draws of several runs by name; ``runs``: their options."""
    from mft_megatron.mcore.parallel import process_groups

    with process_groups.process_groups(arguments_for(prefix, layout, world_size).distributed, seed=1234):
        return {name: _run(prefix, f"{layout} {extra}", world_size, **options) for name, extra in runs.items()}


def weights(log):
    """Task weights of each step, [steps, K]."""
    return np.array([[task["weight"] for task in record["tasks"].values()] for record in log.of_kind("train")])


@functools.cache
def one_process(prefix):
    return run_on_ranks(1, _runs, prefix, "--micro-batch-size 1", 1, BALANCERS)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_balancing_does_not_depend_on_the_layout(dataset_prefix, layout):
    world_size, options = LAYOUTS[layout]
    results = run_on_ranks(world_size, _runs, dataset_prefix, options, world_size, BALANCERS)
    multiple = arguments_for(dataset_prefix, options, world_size).batch_multiple
    for name, (expected, expected_draws) in one_process(dataset_prefix).items():
        # otherwise ranks would get no empty rows
        assert any(rows % multiple for rows, _ in expected_draws)
        for log, draws in (result[name] for result in results):
            np.testing.assert_array_equal(weights(log), weights(results[0][name][0]))  # bit for bit
            np.testing.assert_allclose(weights(log), weights(expected), rtol=0, atol=WEIGHT_TOLERANCES[name])
            assert [rows for rows, _ in draws] == [rows for rows, _ in expected_draws]
            for (_, loss_K), (_, expected_K) in zip(draws, expected_draws, strict=True):
                np.testing.assert_allclose(loss_K, expected_K, rtol=1e-6)


def test_the_weights_change_and_the_draws_differ(dataset_prefix):
    """Otherwise the comparison above would prove nothing."""
    runs = one_process(dataset_prefix)
    for name, (log, draws) in runs.items():
        assert len(draws) == 7  # before the first step and after each
        moved = weights(log)[0 if name == "famo" else 2 :]
        assert np.ptp(moved, axis=0).min() > 100 * WEIGHT_TOLERANCES[name]
        assert (np.ptp(moved, axis=1) > 100 * WEIGHT_TOLERANCES[name]).all()
        np.testing.assert_allclose(moved.sum(1), 1, rtol=1e-12)
        if name != "famo":
            np.testing.assert_array_equal(weights(log)[:2], 0.25)  # the balancers' windows are not full yet
    first = [draws[0][1] for _, draws in runs.values()]
    assert all((loss_K == first[0]).all() for loss_K in first)
    for step in range(2, 6):  # up to here weights and draws are the same; later each run has different ones
        assert len({tuple(weights(log)[step]) for log, _ in runs.values()}) == len(runs)


def comparable(log, after):
    """Train and validation records after a step, without clocks."""
    clocks = {"step_time", "balance_time", "balance_share"}
    return [
        {key: value for key, value in record.items() if key not in clocks}
        for record in log.records
        if record["kind"] != "event" and record["step"] > after
    ]


def test_resumed_runs_are_bit_equal(dataset_prefix, tmp_path):
    """Balancers with half-full windows, and the statistics of focal-task."""
    runs = {**BALANCERS, "focal-task": "--mft-loss focal-task"}
    layout = LAYOUTS["DP2"][1]
    saving = {name: f"{extra} --save {tmp_path / name} --save-interval 3" for name, extra in runs.items()}
    loading = {name: f"{extra} --load {tmp_path / name / 'iter_0000003'}" for name, extra in runs.items()}
    whole = run_on_ranks(2, _runs, dataset_prefix, layout, 2, saving)[0]
    resumed = run_on_ranks(2, _runs, dataset_prefix, layout, 2, loading)
    for name, (log, draws) in whole.items():
        for again, draws_again in (result[name] for result in resumed):
            assert comparable(again, 3) == comparable(log, 3)
            assert len(again.of_kind("train")) == 3
            assert [rows for rows, _ in draws_again] == [rows for rows, _ in draws[4:]]
            for (_, ours), (_, theirs) in zip(draws_again, draws[4:], strict=True):
                np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def with_an_unvalidated_task(dataset_prefix, tokenizer_folder, tmp_path_factory):
    """The tasks of the data set, and one with a single record, which is in the training split."""
    single = tmp_path_factory.mktemp("single") / "single.jsonl"
    single.write_text(Path(dataset_prefix).with_name("read.jsonl").read_text().splitlines(keepends=True)[0])
    return _preprocessed(dataset_prefix, tokenizer_folder, single.with_name("mixed"), {"single": single}, (80, 20, 0))


@pytest.fixture(scope="module")
def without_validation(dataset_prefix, tokenizer_folder, tmp_path_factory):
    return _preprocessed(dataset_prefix, tokenizer_folder, tmp_path_factory.mktemp("train") / "mixed", {}, (100, 0, 0))


def _preprocessed(prefix, tokenizer_folder, output, more_tasks, split):
    from mft_megatron.data.packing.packing_options import PackingOptions
    from mft_megatron.data.preprocessing.preprocess import preprocess
    from mft_megatron.data.preprocessing.recipe import Recipe
    from mft_megatron.data.tasks.task_files import TaskFiles

    files = {name: Path(prefix).with_name(f"{name}.jsonl") for name in ("completion", "explain", "write", "read")}
    tasks = {name: TaskFiles(name, (file,)) for name, file in (files | more_tasks).items()}
    preprocess(Recipe(tasks, "HuggingFaceTokenizer", str(tokenizer_folder), output, PackingOptions(128, split=split)))
    return str(output)


def test_a_task_without_validation_data_has_the_mean_weight(with_an_unvalidated_task):
    for name, (log, draws) in run_on_ranks(1, _runs, with_an_unvalidated_task, "", 1, BALANCERS)[0].items():
        # flat validation curves and missed shares are warned of, too, which depends on the order of the data
        (warning,) = [event for event in log.events("warning") if "no validation data" in event["reason"]]
        kind = BALANCERS[name].split()[1]
        assert warning["reason"] == f"--task-balance {kind}: no validation data; these tasks get the mean weight"
        assert (warning["step"], warning["tasks"]) == (0, ["single"])
        assert all(np.isfinite(loss_K).tolist() == [True] * 4 + [False] for _, loss_K in draws)
        np.testing.assert_allclose(weights(log)[:, 4], weights(log)[:, :4].mean(1), rtol=1e-12)
        np.testing.assert_allclose(weights(log).sum(1), 1, rtol=1e-12)
        assert (np.ptp(weights(log)[2:], axis=1) > 1e-3).all()


def _refusals(prefix):
    from mft_megatron.errors import InputError
    from mft_megatron.training.balancing import task_balance

    messages = {}
    for name, extra in BALANCERS.items():
        arguments = arguments_for(prefix, extra, 1)
        with pytest.raises(InputError) as refused:
            task_balance(arguments, open_dataset(arguments))
        messages[name] = str(refused.value)
    task_balance(arguments_for(prefix, "", 1), open_dataset(arguments_for(prefix, "", 1)))
    return messages


def test_without_a_validation_split_balancers_are_refused(without_validation):
    for name, message in run_on_ranks(1, _refusals, without_validation)[0].items():
        assert message.startswith(f"--task-balance {BALANCERS[name].split()[1]} follows validation losses")
        assert "has no validation split" in message


def test_a_stopped_task_has_weight_0_and_the_others_continue(dataset_prefix, tmp_path):
    """The third task's losses are reported as rising; a run resumed after its stop leaves it out too."""
    balances = {"static": "--task-weights write=5", "coba": BALANCERS["coba"]}
    balances["epoch"] = f"{balances['static']} --mft-normalization epoch"
    stopping = "--micro-batch-size 4 --task-early-stopping-patience 2 --eval-interval 1"
    saving = {name: f"{extra} --save {tmp_path / name} --save-interval 4" for name, extra in balances.items()}
    loading = {name: f"{extra} --load {tmp_path / name / 'iter_0000004'}" for name, extra in balances.items()}
    run = functools.partial(_runs, rising=2)
    whole = run_on_ranks(2, run, dataset_prefix, stopping, 2, saving)
    resumed = run_on_ranks(2, run, dataset_prefix, stopping, 2, loading)
    for name in balances:
        for log, _ in (result[name] for result in whole):
            (stopped,) = log.events("task early stop")
            assert (stopped["task"], stopped["step"], stopped["weight"]) == ("write", 3, 0.0)
            records = log.of_kind("train")
            assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
            assert any(record["tasks"]["write"]["supervised_tokens"] for record in records[3:])
            for record in records:
                write, trained = record["tasks"]["write"], record["step"] <= 3
                assert (write["weight"] > 0) == trained
                assert (write["share"] > 0) == (trained and write["supervised_tokens"] > 0)
                assert sum(task["share"] for task in record["tasks"].values()) == pytest.approx(1)
                # over an epoch, not in each step
                assert name == "epoch" or all(
                    task["share"] == pytest.approx(task["target_share"] or 0) for task in record["tasks"].values()
                )
                assert np.isfinite([record["loss"], record["grad_norm"]]).all()
        for again, _ in (result[name] for result in resumed):
            assert [r["tasks"] for r in again.of_kind("train")] == [r["tasks"] for r in records[4:]]
