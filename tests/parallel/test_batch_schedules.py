"""Batch schedules: the same run on one process and on two data-parallel ranks, uninterrupted and resumed."""

import pytest

from tests.made_dataset import write_dataset
from tests.parallel.run import arguments_for
from tests.ranks import reserved_ports, run_on_ranks
from tests.run_records import events, records

# options, batch size of each step, and the step after which to stop: within one size, and where the size changes
BATCHES = {
    # 4 packs until 12 of them, 8 until 24, then 12
    "ramp": ("--rampup-batch-size 4 4 24 --global-batch-size 12", [4, 4, 4, 8, 8, 12, 12], 4),
    # as with Megatron, the size may also shrink
    "schedule": (
        "--step-batch-size-schedule 0:4,1K:8,3.6k:4 --global-batch-size 4 --decoupled-lr 2e-3",
        [4, 4, 8, 8, 8, 4, 4],
        2,
    ),
}
STEPS = 7
OPTIONS = (
    f"--train-iters {STEPS} --log-interval 1 --eval-iters 0 --lr-decay-style cosine --lr-warmup-iters 2 --min-lr 1e-4"
)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("ramp") / "set"
    write_dataset(prefix, 128, longest=100, tasks={"completion": 2, "write": 5})
    return str(prefix)


def _run(prefix, runs, world_size):
    """Run several runs one after another, each as a user would start it."""
    import os

    from mft_megatron.training.pretrain import pretrain

    for words, port in runs:
        os.environ["MASTER_PORT"] = str(port)  # a separate folder, since a rank may be late in leaving the previous run
        pretrain(arguments_for(prefix, f"{OPTIONS} {words}", world_size), os.environ["RANK"] == "0")


def steps_and_epochs(folder):
    """Records of steps, without times, and of epochs."""
    clocks = {"step_time", "balance_time", "balance_share"}
    steps = [{k: v for k, v in record.items() if k not in clocks} for record in records(folder, "train")]
    return steps, events(folder, "epoch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, prefix):
    """Run folders: ``one/NAME`` of one process, ``two/NAME`` of two, ``resumed/NAME`` of two that stop at STOP."""
    folder = tmp_path_factory.mktemp("runs")
    on_one, on_two = [], []
    for name, (words, _, stop) in BATCHES.items():
        on_one.append(f"{words} --save {folder}/one/{name}")
        on_two.append(f"{words} --save {folder}/two/{name}")
        resumed = f"{words} --save {folder}/resumed/{name} --load {folder}/resumed/{name}"
        on_two += [f"{resumed} --exit-interval {stop}", resumed]
    for world_size, runs in ((1, on_one), (2, on_two)):
        with reserved_ports(len(runs)) as ports:
            run_on_ranks(world_size, _run, prefix, list(zip(runs, ports, strict=True)), world_size)
    return folder


@pytest.mark.parametrize("name", BATCHES)
def test_each_step_has_its_size(folder, name):
    steps, epochs = steps_and_epochs(folder / "one" / name)
    sizes = BATCHES[name][1]
    assert [step["global_batch_size"] for step in steps] == sizes
    assert [step["consumed_samples"] for step in steps] == [sum(sizes[: n + 1]) for n in range(STEPS)]
    assert [step["lr"] for step in steps[:3]] == [0.0, 5e-4, 1e-3]  # by steps, not by samples
    assert epochs, "the runs must reach a second epoch"
    assert all(epoch["complete"] for epoch in epochs)


@pytest.mark.parametrize("name", BATCHES)
def test_two_ranks_take_the_steps_of_one(folder, name):
    (on_one, epochs), (on_two, epochs_on_two) = (steps_and_epochs(folder / kind / name) for kind in ("one", "two"))
    assert epochs_on_two == epochs
    assert len({step["loss"] for step in on_one}) == STEPS
    for step, same in zip(on_two, on_one, strict=True):
        for key in ("global_batch_size", "consumed_samples", "supervised_tokens", "lr"):
            assert step[key] == same[key]
        for key in ("loss", "grad_norm"):
            assert step[key] == pytest.approx(same[key], rel=1e-6)


@pytest.mark.parametrize("name", BATCHES)
def test_a_resumed_run_continues_the_batch_schedule(folder, name):
    assert steps_and_epochs(folder / "resumed" / name) == steps_and_epochs(folder / "two" / name)
    assert [event["step"] for event in events(folder / "resumed" / name, "load")] == [BATCHES[name][2]]
