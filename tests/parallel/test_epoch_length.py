"""Runs of --num-train-epochs: they end with the epoch, the last step holds the packs that remain, on every layout."""

import pytest

from mft_megatron.data.loading.dataset import training_packs
from tests.made_dataset import write_dataset
from tests.parallel.run import arguments_for
from tests.parallel.test_batch_schedules import steps_and_epochs
from tests.ranks import reserved_ports, run_on_ranks
from tests.run_records import events

PACKS = 17
PIPELINE = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --micro-batch-size 1"
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 30001"
BY_EPOCH = "--mft-normalization epoch"
# options, size of each step, shape, and parallel layout of two ranks, all with rows that stay empty in the last step
RUNS = {
    "whole": (f"--num-train-epochs 2 {BY_EPOCH}", [8, 8, 8, 8, 2], "llama", "--micro-batch-size 2"),
    "fraction": ("--num-train-epochs 0.7", [8, 4], "llama", f"{PIPELINE} --global-batch-size 8"),
    "ramp": (
        f"--num-train-epochs 2 --rampup-batch-size 4 4 24 --global-batch-size 12 {BY_EPOCH} --task-weights write=3",
        [4, 4, 4, 8, 8, 6],
        "llama",
        "--micro-batch-size 2",
    ),
    "schedule": (
        "--num-train-epochs 1 --step-batch-size-schedule 0:4,1K:8 --global-batch-size 8 "
        "--mft-normalization micro-batch",
        [4, 4, 8, 1],
        "llama",
        f"--micro-batch-size 1 {OVERLAP}",
    ),
    "experts": (
        "--num-train-epochs 1 --moe-z-loss-coeff 1e-2 --moe-aux-loss-coeff 1e-1",
        [8, 8, 1],
        "experts",
        "--micro-batch-size 2 --expert-model-parallel-size 2",
    ),
}
OPTIONS = "--log-interval 1 --eval-iters 0 --lr-decay-style linear --lr-warmup-fraction 0.5 --min-lr 1e-4"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("epochs") / "set"
    write_dataset(prefix, 128, longest=100, tasks={"completion": 2, "write": 5})
    assert training_packs(prefix, 128) == PACKS
    return str(prefix)


def _run(prefix, runs, world_size):
    """Run several runs one after another, each as a user would start it."""
    import os

    from mft_megatron.training.pretrain import pretrain

    for words, shape, port in runs:
        os.environ["MASTER_PORT"] = str(port)
        pretrain(arguments_for(prefix, f"{OPTIONS} {words}", world_size, shape), os.environ["RANK"] == "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, prefix):
    """Run folders ``one/NAME`` of one process, which has no empty rows, and ``two/NAME`` of two ranks.

    ``resumed`` is the run "whole" on two ranks, stopped after three steps, and then trained to 2.5 epochs.
    """
    folder = tmp_path_factory.mktemp("runs")
    runs = {1: [], 2: []}
    for name, (words, _, shape, layout) in RUNS.items():
        runs[1].append((f"--micro-batch-size 1 {words} --save {folder}/one/{name}", shape))
        runs[2].append((f"{words} {layout} --save {folder}/two/{name}", shape))
    again = f"--micro-batch-size 2 --save {folder}/resumed --load {folder}/resumed --num-train-epochs"
    # only its first part is told how to normalise
    runs[2] += [
        (f"{again} 2 --exit-interval 3 {BY_EPOCH}", "llama"),
        (f"{again} 2", "llama"),
        (f"{again} 2.5", "llama"),
    ]
    for world_size, of_size in runs.items():
        with reserved_ports(len(of_size)) as ports:
            started = [(*run, port) for run, port in zip(of_size, ports, strict=True)]
            run_on_ranks(world_size, _run, prefix, started, world_size)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_the_run_ends_with_the_epoch(folder, name):
    steps, epochs = steps_and_epochs(folder / "one" / name)
    sizes = RUNS[name][1]
    assert [step["global_batch_size"] for step in steps] == sizes
    assert steps[-1]["consumed_samples"] == sum(sizes)
    assert [(epoch["epoch"], epoch["complete"]) for epoch in epochs] == [(k, True) for k in range(sum(sizes) // PACKS)]


@pytest.mark.parametrize("name", RUNS)
def test_the_schedule_knows_the_last_step(folder, name):
    """Step n has the rate after n - 1 steps, so that the decay ends one step after the last."""
    steps, _ = steps_and_epochs(folder / "one" / name)
    last, warmup = len(steps), 0.5 * len(steps)
    for taken, step in enumerate(steps):
        expected = 1e-3 * taken / warmup if taken <= warmup else 1e-3 - 9e-4 * (taken - warmup) / (last - warmup)
        assert step["lr"] == pytest.approx(expected)


@pytest.mark.parametrize("name", RUNS)
def test_empty_rows_change_nothing(folder, name):
    (on_one, epochs), (on_two, epochs_on_two) = (steps_and_epochs(folder / kind / name) for kind in ("one", "two"))
    assert epochs_on_two == epochs
    for step, same in zip(on_two, on_one, strict=True):
        for key in ("global_batch_size", "consumed_samples", "tokens", "supervised_tokens", "lr"):
            assert step[key] == same[key]
        for key in ("loss", "grad_norm"):
            assert step[key] == pytest.approx(same[key], rel=2e-6)
        assert step.get("moe", {}) == pytest.approx(same.get("moe", {}), rel=1e-5)


@pytest.mark.parametrize("name", ["whole", "ramp"])
@pytest.mark.parametrize("ranks", ["one", "two"])
def test_with_epoch_normalisation_a_run_of_whole_epochs_realises_its_weights(folder, ranks, name):
    """Within a run the shares move; no step is as large as another, and epochs end within steps."""
    steps, _ = steps_and_epochs(folder / ranks / name)
    shares = [[task["run_share"] for task in step["tasks"].values()] for step in steps]
    targets = [0.25, 0.75] if name == "ramp" else [0.5, 0.5]
    assert shares[-1] == pytest.approx(targets, rel=1e-12)
    assert shares[-2] != pytest.approx(targets, rel=1e-3)
    assert [task["run_target_share"] for task in steps[-1]["tasks"].values()] == pytest.approx(targets, rel=1e-14)
    assert any(step["mean_loss"] != pytest.approx(step["loss"], rel=1e-3) for step in steps)
    assert not events(folder / ranks / name, "warning")


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(folder):
    steps, epochs = steps_and_epochs(folder / "resumed")
    whole, epochs_of_whole = steps_and_epochs(folder / "two" / "whole")
    assert (steps[:5], epochs[:2]) == (whole, epochs_of_whole)
    assert [event["step"] for event in events(folder / "resumed", "load")] == [3, 5]
    # of 42.5 packs 34 were used, and the half of a pack counts whole
    assert [step["global_batch_size"] for step in steps[5:]] == [8, 1]
    assert steps[-1]["consumed_samples"] == 43
