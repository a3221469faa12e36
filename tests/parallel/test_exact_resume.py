"""Resumed runs: bit-equal on the same parallel layout, the same samples and losses on another, and with other batches.

Every run goes from its arguments through ``pretrain`` to its last checkpoint, as a user starts it.
"""

import shutil

import pytest

from mft_megatron.data.loading.dataset import training_packs
from tests.faults import comparison
from tests.made_dataset import write_dataset
from tests.parallel.layouts import ParallelLayout
from tests.parallel.run import arguments_for
from tests.parallel.test_balancing import BALANCERS
from tests.ranks import reserved_ports, run_on_ranks
from tests.run_records import events, records

STEPS, SAVED = 6, 3
RUN = "--log-interval 1 --eval-interval 2 --eval-iters 1 --save-interval 3 --lr-decay-style cosine --min-lr 1e-4"
SIZES = "--global-batch-size 4 --micro-batch-size 1"
# of the tests of every change; the others run in `make test-all`
QUICK = ("bf16", "in the background", "ramp-up", "larger")
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
# options and shape of runs of six steps on one rank, resumed after the third
EXACT = {
    "fp32": ("--mft-loss task-token", "llama"),
    "bf16": ("--bf16 --mft-loss task-sample --task-weights write=3", "llama"),
    "fp16": ("--fp16 --initial-loss-scale 65536 --loss-scale-window 2", "llama"),
    "in the background": ("--async-save --use-distributed-optimizer --mft-normalization epoch", "llama"),
    "ramp-up": ("--rampup-batch-size 4 4 24 --global-batch-size 12 --mft-normalization epoch", "llama"),
    "early stopping": ("--eval-interval 1 --early-stopping-patience 4 --task-early-stopping-patience 2", "llama"),
    "LoRA": ("--peft-type lora --lora-rank 4 --lora-dropout 0.1", "llama"),
    "experts": ("--moe-z-loss-coeff 1e-3", "experts"),
    "focal-sample": ("--mft-loss focal-sample", "llama"),
    "focal-task": ("--mft-loss focal-task", "llama"),
    **{name: (words, "llama") for name, words in BALANCERS.items()},
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """A data set of two tasks in 15 training packs, so that short runs reach a second epoch."""
    prefix = tmp_path_factory.mktemp("resumed") / "set"
    write_dataset(prefix, 128, longest=100, tasks={"completion": 2, "write": 5}, split=(80, 20, 0))
    assert training_packs(prefix, 128) == 15
    return str(prefix)


def _run(prefix, runs, world_size):
    """Run several runs one after another."""
    import os

    from mft_megatron.training.pretrain import pretrain

    for words, shape, port in runs:
        os.environ["MASTER_PORT"] = str(port)  # a separate one, since a rank may be late in leaving the previous run
        pretrain(arguments_for(prefix, f"{RUN} {SIZES} {words}", world_size, shape), os.environ["RANK"] == "0")


def _run_all(prefix, runs, world_size=1):
    with reserved_ports(len(runs)) as ports:
        run_on_ranks(
            world_size, _run, prefix, [(*run, port) for run, port in zip(runs, ports, strict=True)], world_size
        )


def _beginning_of(folder, into, step):
    """Copy a run as it was when a checkpoint was complete."""
    name = f"iter_{step:07d}"
    shutil.copytree(folder / name, into / name)
    (into / "latest_checkpointed_iteration.txt").write_text(f"{step}\n")
    return f"--save {into} --load {into}"


def _marked(names):
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in names]


def _of_test(name, table):
    """The entries of a table that are run together: those of the quick tests, or the others."""
    return {one: entry for one, entry in table.items() if (one in QUICK) == (name in QUICK)}


@pytest.fixture(scope="module")
def exact(prefix, tmp_path_factory):
    """Call a function with a name of :data:`EXACT` for its run folders: uninterrupted, and resumed."""
    made = {}

    def folders(name):
        if name not in made:
            folder = _train_and_resume(prefix, tmp_path_factory.mktemp("runs"), _of_test(name, EXACT))
            made.update(dict.fromkeys(_of_test(name, EXACT), folder))
        return [made[name] / kind / name.replace(" ", "_") for kind in ("whole", "resumed")]

    return folders


def _train_and_resume(prefix, folder, table):
    """Write run folders ``whole/NAME`` and ``resumed/NAME`` of a table."""
    again = []
    words = f"{DROPOUT} --train-iters {STEPS}"
    _run_all(prefix, [(f"{words} {extra} --save {folder}/whole/{name.replace(' ', '_')}", shape)
                      for name, (extra, shape) in table.items()])  # fmt: skip
    for name, (extra, shape) in table.items():
        name = name.replace(" ", "_")
        folders = _beginning_of(folder / "whole" / name, folder / "resumed" / name, SAVED)
        again.append((f"{words} {extra} {folders}", shape))
    _run_all(prefix, again)
    return folder


@pytest.mark.parametrize("name", _marked(EXACT))
def test_on_the_same_layout_a_resumed_run_is_bit_equal(exact, name):
    """Weights, states of the optimizer and all others, losses, shares, evaluations and digests; dropout is on."""
    whole, resumed = exact(name)
    last = f"iter_{STEPS:07d}"
    assert comparison.digests(resumed)[last] == comparison.digests(whole)[last]
    (of_whole, _), (of_resumed, problems) = comparison.records(whole), comparison.records(resumed)
    assert problems == []
    assert of_resumed == {key: record for key, record in of_whole.items() if record["step"] > SAVED}
    assert len(of_resumed) >= STEPS - SAVED


# layouts of the resumed run; those of one size are started one after another on the same ranks
QUICKLY = {"llama": ("MB2", "DP2", "CP2")}
ALL = {
    "llama": ("TP2 SP", "PP2 VPP2", "DP2 overlap", "TP2 PP2", "CP2 TP2 SP", "PP2 DP2", "CP2 DP2", "DP4"),
    "experts": ("MB2", "DP2 EP2 alltoall", "TP2 SP DP2 EP2 ETP1 alltoall"),
}
# the layout that saves
WRITERS = {"llama": "TP2 SP", "experts": "MB1"}
NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0 --mft-loss task-token --task-weights write=3"


@pytest.fixture(scope="module")
def elsewhere(prefix, tmp_path_factory):
    """Run folders ``SHAPE/whole`` of one rank, and ``SHAPE/LAYOUT`` of runs that continue what another layout saved."""

    def run(layouts):
        folder = tmp_path_factory.mktemp("elsewhere")
        _run_all(
            prefix, [(f"{NO_DROPOUT} --train-iters {STEPS} --save {folder}/{shape}/whole", shape) for shape in layouts]
        )
        by_size = {}
        for shape, names in layouts.items():
            writer = ParallelLayout(WRITERS[shape])
            words = f"{NO_DROPOUT} --train-iters {STEPS} --exit-interval {SAVED} {writer.options}"
            _run_all(prefix, [(f"{words} --save {folder}/{shape}/begun", shape)], writer.world_size)
            for name in names:
                into = folder / shape / name.replace(" ", "_")
                resumed = _beginning_of(folder / shape / "begun", into, SAVED)
                layout = ParallelLayout(name)
                words = f"{NO_DROPOUT} --train-iters {STEPS} {layout.options} {resumed}"
                by_size.setdefault(layout.world_size, []).append((words, shape))
        for size, runs in by_size.items():
            _run_all(prefix, runs, size)
        return folder

    return run


def _same_samples_and_losses(folder, layouts):
    for shape, names in layouts.items():
        whole, epochs = records(folder / shape / "whole", "train"), events(folder / shape / "whole", "epoch")
        assert [epoch["complete"] for epoch in epochs] == [True]
        for name in names:
            resumed = folder / shape / name.replace(" ", "_")
            assert events(resumed, "epoch") == epochs, name
            steps = records(resumed, "train")
            assert [step["step"] for step in steps] == list(range(SAVED + 1, STEPS + 1))
            for step, same in zip(steps, whole[SAVED:], strict=True):
                for key in ("consumed_samples", "tokens", "supervised_tokens", "lr"):
                    assert step[key] == same[key], name
                for key in ("loss", "mean_loss", "grad_norm"):
                    assert step[key] == pytest.approx(same[key], rel=1e-6 if key != "grad_norm" else 4e-6), name
                for task, of_task in step["tasks"].items():
                    assert of_task["run_share"] == pytest.approx(same["tasks"][task]["run_share"], rel=1e-6)


def test_on_another_layout_a_run_takes_the_same_samples_to_the_same_losses(elsewhere):
    _same_samples_and_losses(elsewhere(QUICKLY), QUICKLY)


@pytest.mark.slow
def test_on_all_other_layouts_too(elsewhere):
    _same_samples_and_losses(elsewhere(ALL), ALL)


# options of the first part, which ends after three steps; of the second; and the sizes of all steps
BATCHES = {
    "larger": ("--global-batch-size 4", "--global-batch-size 6", [4, 4, 4, 6, 6, 6]),
    "smaller": ("--global-batch-size 6", "--global-batch-size 4", [6, 6, 6, 4, 4, 4]),
    "after a ramp-up": (
        "--rampup-batch-size 4 4 12 --global-batch-size 12",
        "--global-batch-size 6 --mft-normalization epoch",
        [4, 4, 8, 6, 6, 2],
    ),
    "into a ramp-up": (
        "--global-batch-size 4",
        "--rampup-batch-size 4 4 24 --global-batch-size 12",
        [4, 4, 4, 8, 8, 2],
    ),
    "several epochs at once": ("--global-batch-size 2", "--global-batch-size 40", [2, 2, 2, 24]),
}
EPOCHS = 2


@pytest.fixture(scope="module")
def other_batches(prefix, tmp_path_factory):
    """Call a function with a name of :data:`BATCHES` for the run folders: resumed with other batches, and ``whole``."""
    made = {}

    def folder(name):
        if name not in made:
            table = _of_test(name, BATCHES)
            made.update(dict.fromkeys(table, _resume_with_other_batches(prefix, tmp_path_factory.mktemp("b"), table)))
        return made[name]

    return folder


def _resume_with_other_batches(prefix, folder, table):
    runs = []
    length = f"{NO_DROPOUT} --num-train-epochs {EPOCHS}"
    for name, (first, second, _) in table.items():
        folders = f"--save {folder}/{name.replace(' ', '_')} --load {folder}/{name.replace(' ', '_')}"
        runs += [(f"{length} {folders} {first} --exit-interval 3", "llama"), (f"{length} {folders} {second}", "llama")]
    _run_all(prefix, [*runs, (f"{length} --save {folder}/whole --global-batch-size 8", "llama")])
    return folder


@pytest.mark.parametrize("name", _marked(BATCHES))
def test_with_another_batch_size_every_sample_is_still_used_exactly_once(other_batches, name):
    """The plan is a function of the packs that were consumed: it goes on with the next one, whatever a step holds."""
    folder = other_batches(name)
    steps = records(folder / name.replace(" ", "_"), "train")
    sizes = BATCHES[name][2]
    assert [step["global_batch_size"] for step in steps] == sizes
    assert [step["consumed_samples"] for step in steps] == [sum(sizes[: n + 1]) for n in range(len(sizes))]
    epochs, of_whole = (events(folder / one, "epoch") for one in (name.replace(" ", "_"), "whole"))
    assert [epoch["complete"] for epoch in epochs] == [True] * EPOCHS
    for epoch, same in zip(epochs, of_whole, strict=True):
        assert (epoch["epoch"], epoch["tasks"]) == (same["epoch"], same["tasks"])
