"""Losses, balancers, early stopping and the best checkpoint through the command line of pretrain_mft.py."""

import math
import shutil

import pytest

from tests.functional.test_pretrain_command import MODEL
from tests.preprocessed_again import preprocess_again
from tests.ranks import run_forked
from tests.refusals import refusal
from tests.run_records import events, records

RUN = "--global-batch-size 8 --lr 1e-3 --log-interval 1 --attention-dropout 0 --hidden-dropout 0".split()
COBA = "--task-balance coba --coba-warmup-steps 2 --coba-history-length 3 --coba-update-interval 2"


def command(prefix, folder, extra, iterations=6):
    words = [*MODEL, *RUN, "--data-path", prefix, "--save", folder, "--train-iters", iterations]
    micro = [] if "--micro-batch-size" in extra else ["--micro-batch-size", 2]
    return ["pretrain_mft.py", *words, *micro, *extra.split()]


def trained(prefix, folder, extra, iterations=6):
    """Train in one process; the run folder."""
    process = run_forked(*command(prefix, folder, extra, iterations))
    assert process.returncode == 0, process.stderr
    return folder


def weights(record):
    return [task["weight"] for task in record["tasks"].values()]


def test_a_balanced_run_resumes_bit_equal(dataset_prefix, tmp_path):
    """Resume between two validation draws; tests/parallel/test_balancing.py does so with each balancer."""
    extra = f"{COBA} --pipeline-model-parallel-size 2 --save-interval 3 --eval-interval 3"
    whole = tmp_path / "whole"
    process = run_forked(*command(dataset_prefix, whole, extra), world_size=2)
    assert process.returncode == 0, process.stderr
    shutil.copytree(whole / "iter_0000003", tmp_path / "saved" / "iter_0000003")
    again = tmp_path / "again"
    extra = f"{extra} --load {tmp_path / 'saved' / 'iter_0000003'}"
    process = run_forked(*command(dataset_prefix, again, extra), world_size=2)
    assert process.returncode == 0, process.stderr
    expected, resumed = records(whole, "train")[3:], records(again, "train")
    for record in expected + resumed:
        for name in ("step_time", "balance_time", "balance_share"):
            del record[name]
    assert resumed == expected
    assert records(again, "valid") == records(whole, "valid")[-1:]
    assert len({tuple(weights(record)) for record in expected}) > 1  # the weights change
    for record in expected:
        assert sum(weights(record)) == pytest.approx(1.0)


def test_draws_are_timed_and_the_first_losses_are_logged(dataset_prefix, tmp_path):
    folder = trained(dataset_prefix, tmp_path / "run", COBA + " --eval-interval 6", iterations=4)
    assert [record["step"] for record in records(folder, "valid")] == [0, 4]
    shares = [record["balance_share"] for record in records(folder, "train")]
    assert shares[0] == shares[2] == 0 < shares[1]  # a validation draw after every second step
    config = (folder / "config.yaml").read_text()
    assert "task_balance: coba" in config
    assert "coba_history_length: 3" in config


def test_for_a_skipped_step_the_nearest_trained_one_is_logged(dataset_prefix, tmp_path):
    """Give a weight to the rarest task only, so that most steps are skipped; the epoch has it, so they have factors."""
    extra = "--task-weights completion=0 explain=0 write=0 --global-batch-size 2 --log-interval 4 --eval-interval 99"
    extra += " --mft-normalization epoch"
    folder = trained(dataset_prefix, tmp_path / "run", extra, iterations=16)
    skipped = {event["step"] for event in events(folder, "skip")}
    trained_steps = sorted(set(range(1, 17)) - skipped)
    assert len(skipped) > 4
    assert len(trained_steps) >= 2
    expected, due, unlogged = [], False, None
    for step in range(1, 17):
        due = due or step % 4 == 0
        unlogged = step if step in trained_steps else unlogged
        if due and unlogged:
            expected, due, unlogged = [*expected, unlogged], False, None
    assert [record["step"] for record in records(folder, "train")] == expected
    assert trained_steps[-1] in expected


@pytest.mark.parametrize("loss", ["focal-sample", "focal-task"])
def test_runs_with_focal_losses(dataset_prefix, tmp_path, loss):
    extra = f"--mft-loss {loss} --focal-gamma 1 --focal-alpha write=2 --eval-interval 1"
    folder = trained(dataset_prefix, tmp_path / loss, extra)
    train = records(folder, "train")
    assert [weights(record) for record in train] == [[1.0, 1.0, 2.0, 1.0]] * 6
    assert all(task["target_share"] is None for record in train for task in record["tasks"].values())
    # training losses of two steps are of different batches
    first, *_, last = (record["macro_loss"] for record in records(folder, "valid"))
    assert last < first


def test_micro_batch_normalisation_warns_about_realised_shares(dataset_prefix, tmp_path):
    """MFTCoder's normalisation: a task that is alone in its micro-batch counts by its frequency."""
    extra = "--mft-normalization micro-batch --micro-batch-size 1"
    process = run_forked(*command(dataset_prefix, tmp_path / "run", extra, iterations=2))
    assert process.returncode == 0, process.stderr
    warnings = events(tmp_path / "run", "warning")
    assert [warning["step"] for warning in warnings] == [2]  # at the end of the run
    assert "--mft-normalization micro-batch divides by the weights" in warnings[0]["reason"]
    assert "step 2 | warning | reason realised shares of the objective in 2 steps so far: " in process.stdout
    last = records(tmp_path / "run", "train")[-1]["tasks"]
    assert any(f"{name} has {task['run_share']:.1%} for 25.0%" in warnings[0]["reason"] for name, task in last.items())
    exact = trained(dataset_prefix, tmp_path / "global", "--micro-batch-size 1", iterations=2)
    steps = records(exact, "train")
    for task in steps[0]["tasks"].values():
        assert task["share"] == pytest.approx(task["target_share"], rel=1e-9)
    off = {name for record in steps for name, task in record["tasks"].items() if not task["supervised_tokens"]}
    assert all("(absent from " in warning["reason"] for warning in events(exact, "warning"))
    assert bool(off) == bool(events(exact, "warning"))


def test_early_stopping_keeps_the_best_and_ends(dataset_prefix, tmp_path):
    """A learning rate that raises the loss after a while: the run ends, and its best checkpoint is kept."""
    folder = tmp_path / "run"
    extra = "--early-stopping-patience 2 --eval-interval 1 --lr 0.2 --clip-grad 100"
    trained(dataset_prefix, folder, extra, iterations=40)
    valid = records(folder, "valid")
    macro = [record["macro_loss"] for record in valid]
    best = valid[macro.index(min(macro))]["step"]
    assert len(valid) < 40
    assert valid[-1]["step"] == best + 2
    (stop,) = events(folder, "early stop")
    assert f"best {min(macro):.6g} at step {best}" in stop["reason"]
    assert (folder / "best_checkpointed_iteration.txt").read_text().strip() == str(best)
    assert (folder / "latest_checkpointed_iteration.txt").read_text().strip() == str(best + 2)
    assert {path.name for path in folder.glob("iter_*")} == {f"iter_{best:07d}", f"iter_{best + 2:07d}"}

    # a job that is restarted with the same command does not continue training
    again = run_forked(*command(dataset_prefix, folder, f"{extra} --load {folder}", iterations=40))
    assert again.returncode == 0, again.stderr
    assert len(records(folder, "valid")) == len(valid)
    assert "early stop" in again.stdout
    for flag, iteration in (("--best", best), (None, best + 2)):
        hf = tmp_path / f"hf{iteration}"
        flags = [flag] if flag else []
        process = run_forked("tools/convert_checkpoint.py", "mcore-to-hf", "--load", folder, "--hf", hf, *flags)
        assert process.returncode == 0, process.stderr
        assert f"iteration {iteration}" in process.stdout


def test_a_task_that_has_converged_is_stopped(dataset_prefix, tmp_path):
    """An improvement that is never large enough: each task is stopped at its second evaluation."""
    extra = "--task-early-stopping-patience 1 --early-stopping-patience 99 --early-stopping-min-delta 100"
    folder = trained(dataset_prefix, tmp_path / "run", f"{extra} --eval-interval 2", iterations=9)
    stopped = events(folder, "task early stop")
    assert [event["step"] for event in stopped] == [4, 4, 4, 4]
    assert {event["task"] for event in stopped} == {"completion", "explain", "write", "read"}
    assert all(math.isfinite(event["best_loss"]) and event["best_step"] == 2 for event in stopped)
    (stop,) = events(folder, "early stop")
    assert (stop["step"], stop["reason"]) == (4, "every task has stopped (--task-early-stopping-patience 1)")


def test_early_stopping_on_one_task(dataset_prefix, tmp_path):
    extra = "--early-stopping-patience 1 --early-stopping-metric write --early-stopping-min-delta 100 --eval-interval 1"
    folder = trained(dataset_prefix, tmp_path / "run", extra)
    (stop,) = events(folder, "early stop")
    assert stop["step"] == 2
    assert "validation loss of write" in stop["reason"]


def refused(prefix, *words):
    return refusal(
        run_forked(
            "pretrain_mft.py", *MODEL, *RUN, "--micro-batch-size", 2, "--train-iters", 2, "--data-path", prefix, *words
        )
    )


def test_unknown_tasks_are_refused_before_the_run(dataset_prefix):
    assert "with a task of: completion" in refused(
        dataset_prefix, "--mft-loss", "focal-task", "--focal-alpha", "none=2"
    )
    assert "--famo-min-losses none=2" in refused(
        dataset_prefix, "--task-balance", "famo", "--famo-min-losses", "none=2"
    )
    words = ("--early-stopping-patience", 2, "--early-stopping-metric", "none")
    assert "--early-stopping-metric none: give macro" in refused(dataset_prefix, *words)


@pytest.fixture(scope="module")
def without_validation(dataset_prefix, tmp_path_factory):
    """The data set of the same tasks without a validation split."""
    prefix = tmp_path_factory.mktemp("without") / "mixed"
    preprocess_again(dataset_prefix, prefix, "--split", "100,0,0")
    return str(prefix)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--task-balance coba", "has no validation split"),
        ("--early-stopping-patience 2", "no task has validation samples"),
        ("--task-early-stopping-patience 2", "no task has validation samples"),
        ("--save-best --save {tmp}", "--save-best compares evaluations"),
    ],
)
def test_options_that_need_a_validation_split_are_refused(without_validation, tmp_path, words, text):
    line = refused(without_validation, *words.format(tmp=tmp_path / "run").split())
    assert text in line
    assert not (tmp_path / "run").exists()
