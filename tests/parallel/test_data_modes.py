"""Padded and joined data sets on every parallel layout, and the proof that an epoch used its data as planned.

Padded micro-batches are as wide as their longest row, so their shapes differ, also between pipeline stages.
"""

import functools
import itertools

import numpy as np
import pytest

from tests.made_dataset import write_dataset
from tests.parallel.layouts import ParallelLayout
from tests.parallel.run import arguments_for, data_seed, open_dataset, plans_of, train
from tests.parallel.test_balancing import Log
from tests.ranks import run_on_ranks

MULTIPLE = 8  # instead of 64, with which rows of 128 tokens have only two widths
TOLERANCE = 1e-6
QUICK = ("TP2 SP MB2", "PP2 MB2", "DP2", "PP2 VPP2 MB2", "CP2")
SLOW = ("TP2 MB2", "PP2 DP2", "TP2 PP2 VPP2 MB2", "MB1", "CP2 TP2 SP", "CP2 PP2 VPP2", "DP2 overlap")


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("padded") / "set"
    write_dataset(prefix, 128, longest=300, split=(80, 20, 0), padding_mode="padding", overlong="truncate")
    return str(prefix)


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("joined") / "set"
    write_dataset(prefix, 128, longest=400, documents=True, split=(80, 20, 0), padding_mode="concat")
    return str(prefix)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A small packed data set, of which a few steps are an epoch."""
    prefix = tmp_path_factory.mktemp("packed") / "set"
    write_dataset(prefix, 128, longest=120, split=(80, 20, 0))
    return str(prefix)


def _train(prefix, extra, world_size, dynamic=True):
    """Run :func:`run.train`; return its curve and sums, and the shapes of the micro-batches."""
    from mft_megatron.mcore import trainer as step

    step.WIDTH_MULTIPLE = MULTIPLE if dynamic else 128
    shapes, to_device = [], step.to_device

    def keep(batch):
        shapes.append(batch.tokens_BS.shape)
        return to_device(batch)

    step.to_device = keep
    return (*train(prefix, f"--mft-loss task-sample {extra}", world_size), shapes)


@functools.cache
def one_process(prefix):
    return run_on_ranks(1, _train, prefix, "--micro-batch-size 2", 1)[0]


def compare(prefix, layout):
    expected, expected_sums, _ = one_process(prefix)
    layout = ParallelLayout(layout)
    results = run_on_ranks(layout.world_size, _train, prefix, layout.options, layout.world_size)
    for curve, sums, _ in results:
        for step, (ours, theirs) in enumerate(zip(curve, expected, strict=True)):
            assert ours == pytest.approx(theirs, rel=TOLERANCE), f"step {step + 1}: (loss, gradient norm)"
        for name, values in sums.items():
            assert values == pytest.approx(expected_sums[name], rel=TOLERANCE), name
    return results


@pytest.mark.parametrize("layout", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_padded_rows_equal_one_process(padded, layout):
    results = compare(padded, layout)
    assert all(len({width for _, width in shapes}) > 2 for *_, shapes in results)


def _train_counting_shapes(prefix, extra, world_size, known):
    """Train; return the curve and how many shapes this rank sent and received."""
    import torch
    from torch import distributed as dist

    from mft_megatron.mcore import trainer as step

    if not known:
        step.take_known_shapes = lambda: None
    shapes, batched = [], dist.batch_isend_irecv

    def count(operations):
        shapes.extend(operation for operation in operations if operation.tensor.dtype == torch.int64)
        return batched(operations)

    dist.batch_isend_irecv = count
    curve, *_ = _train(prefix, extra, world_size)
    return curve, len(shapes)


def test_megatron_sends_every_shape(padded):
    """On a GPU it waits for the whole device, and for the shape, in each of these messages."""
    layout = ParallelLayout("PP2 MB2")
    sent, known = (run_on_ranks(2, _train_counting_shapes, padded, layout.options, 2, known) for known in (False, True))
    assert [curve for curve, _ in known] == [curve for curve, _ in sent]
    assert all(shapes > 0 for _, shapes in sent)
    assert not any(shapes for _, shapes in known)


def test_padded_micro_batches_are_no_wider_than_they_must(padded):
    dataset = open_dataset(arguments_for(padded, "", 1))
    curve, _, shapes = one_process(padded)
    widths = [width for _, width in shapes]
    assert all(width % MULTIPLE == 0 and MULTIPLE <= width <= 128 for width in widths)
    assert all(a >= b for step in zip(*[iter(widths)] * 4, strict=True) for a, b in itertools.pairwise(step))
    split = dataset.split("train")
    tokens = sum(split.num_tokens(plan.packs_G) for plan in plans_of(split, data_seed(split)))
    assert tokens / (2 * sum(widths)) > 0.85  # at full width less than 0.7 of the tokens are real
    assert curve[-1][0] < curve[0][0] - 0.1


def test_padding_changes_nothing(padded):
    """Rows as wide as the sequence length give the same results."""
    ours, theirs = one_process(padded), run_on_ranks(1, _train, padded, "--micro-batch-size 2", 1, False)[0]
    assert {width for _, width in theirs[2]} == {128}
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert a == pytest.approx(b, rel=TOLERANCE)


@pytest.mark.parametrize("layout", ["TP2 MB2", "PP2 MB2", "DP2", "CP2"])
def test_joined_rows_equal_one_process(joined, layout):
    compare(joined, layout)


def test_joined_rows_are_learnt(joined):
    dataset = open_dataset(arguments_for(joined, "", 1))
    split = dataset.split("train")
    slices = [split.slices_of(pack) for pack in range(split.num_packs)]
    assert any(len(of_row.samples) > 1 for of_row in slices)
    assert any((of_row.starts > 0).any() for of_row in slices)
    curve, sums, shapes = one_process(joined)
    assert curve[-1][0] < curve[0][0] - 0.1
    assert set(shapes) == {(2, 128)}
    plan = plans_of(split, data_seed(split))[-1]
    assert sums["tokens_K"] == plan.counts.tokens_K.tolist()


LOOP = "--log-interval 100 --eval-interval 100 --global-batch-size 8"  # records of steps would show a fault before


def _run(prefix, extra, world_size, fault=None):
    """Run as pretrain_mft.py does; return the log, or the message of the error that ended the run."""
    from mft_megatron.errors import InputError
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer
    from mft_megatron.training.bad_steps.bad_steps import BadSteps
    from mft_megatron.training.epochs import EpochProof
    from mft_megatron.training.evaluation import Evaluation
    from mft_megatron.training.loop import train as train_loop
    from mft_megatron.training.saving.resume import resume
    from mft_megatron.training.saving.saver import Saver
    from mft_megatron.training.shares.share_log import ShareLog

    if fault is not None:
        _plant(fault)
    arguments = arguments_for(prefix, f"{LOOP} {extra}", world_size)
    dataset = open_dataset(arguments)
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        evaluation, epochs, log = Evaluation(arguments, dataset), EpochProof(arguments, dataset), Log()
        trainer = Trainer(arguments, dataset.vocab_size, len(dataset.tasks))
        progress, state = resume(arguments, trainer, log)
        if fault == "older checkpoint":
            state.pop("usage")
        shares, saver = ShareLog(arguments, dataset), Saver(arguments, dataset)
        bad_steps = BadSteps(arguments, dataset, saver.of_this_run)
        for part in (evaluation, epochs, shares, bad_steps):
            part.load(state, log, progress)
        try:
            train_loop(arguments, dataset, trainer, evaluation, epochs, shares, bad_steps, saver, log, progress)
        except InputError as error:
            return str(error)
        return log


def _plant(fault):
    """Use the third global batch wrongly on one rank, as a faulty program could."""
    from mft_megatron.data.loading.micro_batches import MicroBatches

    of_plan, steps = MicroBatches.of_plan, itertools.count()

    def wrong(split, plan, ranks, *sizes):
        micro_batches = of_plan(split, plan, ranks, *sizes)
        if next(steps) == 2 and ranks.data_rank == ranks.data_size - 1:
            first = micro_batches._rows[0]
            if fault == "doubled":
                first[0] = first[1]
            if fault == "lost":
                first[0] = first[0].take(slice(1, None))
        return micro_batches

    MicroBatches.of_plan = wrong


EPOCH_LAYOUTS = {
    "one": (1, "--micro-batch-size 2"),
    "DP2": (2, "--micro-batch-size 2"),
    "DP4": (4, "--micro-batch-size 1"),
    "PP2 VPP2": (2, ParallelLayout("PP2 VPP2 MB2").options),
    "TP2 DP2": (4, ParallelLayout("TP2 DP2 MB2").options),
}


def steps_of_epochs(prefix, epochs):
    packs = open_dataset(arguments_for(prefix, "", 1)).split("train").num_packs
    assert packs % 8  # otherwise no global batch would belong to two epochs
    return -(-epochs * packs // 8), packs


@functools.cache
def epochs_of(prefix, layout, epochs=2):
    world_size, options = EPOCH_LAYOUTS[layout]
    steps, _ = steps_of_epochs(prefix, epochs)
    return run_on_ranks(world_size, _run, prefix, f"{options} --train-iters {steps}", world_size)


@pytest.mark.parametrize("layout", ["DP2", "PP2 VPP2", pytest.param("TP2 DP2", marks=pytest.mark.slow)])
def test_every_layout_uses_the_data_as_planned(packed, layout):
    from mft_megatron.data.loading.usage import planned_usage

    dataset = open_dataset(arguments_for(packed, "", 1))
    planned = planned_usage(dataset.split("train"))
    tasks = {
        name: {"samples": int(slices), "digest": f"{digest:016x}"}
        for name, slices, digest in zip(dataset.tasks, planned.slices_K, planned.digest_K.tolist(), strict=True)
    }
    assert len({task["digest"] for task in tasks.values()}) == len(tasks)
    _, packs = steps_of_epochs(packed, 2)
    for log in epochs_of(packed, layout):
        events = log.events("epoch")
        assert [event["epoch"] for event in events] == [0, 1]
        assert [event["step"] for event in events] == [-(-packs // 8), -(-2 * packs // 8)]
        assert all(event["complete"] for event in events)
        assert all(event["tasks"] == tasks for event in events)


@pytest.mark.parametrize("fault", ["doubled", "lost"])
def test_a_row_that_is_used_wrongly_ends_the_run(packed, fault):
    world_size, options = EPOCH_LAYOUTS["DP2"]
    steps, _ = steps_of_epochs(packed, 1)
    for message in run_on_ranks(world_size, _run, packed, f"{options} --train-iters {steps}", world_size, fault):
        assert isinstance(message, str)
        assert message.startswith(f"step {steps}: epoch 0 did not use the data as planned: ")
        assert "slices of" in message
        assert "\n" not in message


def other_warnings(log):
    """Warnings that are not about the tasks' shares, which depend on the order of the data."""
    return [event for event in log.events("warning") if "realised shares" not in event["reason"]]


def test_a_resume_on_another_layout_continues_the_count(packed, tmp_path):
    steps, packs = steps_of_epochs(packed, 2)
    middle = packs // 8 + 2  # in the second epoch
    world_size, options = EPOCH_LAYOUTS["DP2"]
    saving = f"{options} --train-iters {middle} --lr-decay-iters 99 --save {tmp_path / 'run'}"
    run_on_ranks(world_size, _run, packed, saving, world_size)
    expected = epochs_of(packed, "DP2")[0].events("epoch")[1]
    for layout in ("one", "DP4"):
        world_size, options = EPOCH_LAYOUTS[layout]
        loading = f"{options} --train-iters {steps} --lr-decay-iters 99 --load {tmp_path / 'run'}"
        for log in run_on_ranks(world_size, _run, packed, loading, world_size):
            (event,) = log.events("epoch")
            assert event == expected
            assert other_warnings(log) == []
    # a checkpoint without counts, of an old version: the rest of its epoch is counted and not compared with the plan
    (log,) = run_on_ranks(1, _run, packed, loading.replace("-size 1", "-size 2"), 1, "older checkpoint")
    (warning,) = other_warnings(log)
    assert "the checkpoint has no counts; epoch 1 is not judged" in warning["reason"]
    (event,) = log.events("epoch")
    assert event["complete"] is False
    assert sum(task["samples"] for task in event["tasks"].values()) < np.sum(
        [task["samples"] for task in expected["tasks"].values()]
    )
