"""Experts on several ranks equal one process, and a checkpoint of any parallel layout is resumed on any other.

:mod:`.test_layout_matrix` has every loss on layouts with experts; ``tests/mcore/moe/test_experts.py`` compares
gradients with a reference.
"""

import functools
from pathlib import Path

import pytest
import torch

from tests.parallel.run import TASK_WEIGHTS, arguments_for, open_dataset, plans_of
from tests.ranks import run_on_ranks

BALANCED = "--moe-z-loss-coeff 1e-2"
# one row per micro-batch, of which each rank has some tokens
SP = "--tensor-model-parallel-size 2 --sequence-parallel --micro-batch-size 1"
EP = "--expert-model-parallel-size 2 --micro-batch-size 1"
PP = "--pipeline-model-parallel-size 2"
SENT = "--moe-token-dispatcher-type alltoall"
WHOLE = f"{SP} --expert-tensor-parallel-size 1"
SHARED = f"{BALANCED} --moe-shared-expert-intermediate-size 64 --moe-shared-expert-gate"
SIGMOID = f"{BALANCED} --moe-router-score-function sigmoid --moe-router-enable-expert-bias"
GROUPS = "--moe-router-num-groups 2 --moe-router-group-topk 1 --moe-router-topk-scaling-factor 2.5"
SINKHORN = f"{BALANCED} --moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff 0"
CAPACITY = f"{BALANCED} --moe-expert-capacity-factor 1.0"
# by rows per micro-batch, which router losses depend on: ranks, options of the model, options of the parallel layout
CASES = {
    "TP2 SP ETP1 EP2, sent, shared and overlapped": (
        2,
        SHARED,
        f"{WHOLE} --expert-model-parallel-size 2 {SENT} --moe-shared-expert-overlap",
        2,
    ),
    "EP2, groups and biases": (2, f"{SIGMOID} {GROUPS}", EP, 2),
}
MORE = {
    "EP2, full experts": (2, CAPACITY, EP, 1),
    "EP2": (2, BALANCED, EP, 2),
    "EP2, sent": (2, BALANCED, f"{EP} {SENT}", 2),
    "TP2 SP": (2, BALANCED, SP, 2),
    "TP2 SP, sent": (2, BALANCED, f"{SP} {SENT}", 2),
    "TP2 SP ETP1": (2, BALANCED, WHOLE, 2),
    "TP2 SP ETP1 EP2": (2, BALANCED, f"{WHOLE} --expert-model-parallel-size 2", 2),
    "CP2": (2, BALANCED, "--context-parallel-size 2", 2),
    "CP2 EP2": (2, BALANCED, "--context-parallel-size 2 --expert-model-parallel-size 2", 2),
    "PP2 VPP2": (2, BALANCED, f"{PP} --num-virtual-stages-per-pipeline-rank 2", 2),
    "ETP2": (2, BALANCED, "--expert-tensor-parallel-size 2 --micro-batch-size 1", 2),
    "EP4": (4, BALANCED, EP.replace("2", "4"), 2),
    "EP2 PP2": (4, BALANCED, f"{EP} {PP}", 2),
    "EP2 TP2 SP": (4, BALANCED, f"{EP} {SP}", 2),
    "CP2 EP2 TP2 SP": (4, BALANCED, f"{SP} --context-parallel-size 2 --expert-model-parallel-size 2", 2),
    "EP2 overlap": (2, BALANCED, f"{EP} --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", 2),
    "EP2, recomputed": (2, BALANCED, f"{EP} --recompute-granularity selective --recompute-modules moe", 2),
    "PP2, three layers with experts": (
        2,
        f"{BALANCED} --moe-layer-freq [0]+[1]*3",
        f"{PP} --decoder-last-pipeline-num-layers 3",
        2,
    ),
    "PP2, experts on one rank": (
        2,
        f"{BALANCED} --moe-layer-freq [1,0,0,0]",
        f"{PP} --decoder-first-pipeline-num-layers 1",
        2,
    ),
    "PP2, every other layer": (
        2,
        f"{BALANCED} --moe-layer-freq 2",
        f"{PP} --pipeline-model-parallel-layout Et|t|tt|L",
        2,
    ),
    "EP2 TP2 SP, shared": (4, SHARED, f"{EP} {SP}", 2),
    "TP2 SP, biases": (2, SIGMOID, SP, 2),
    "EP2, one of four": (2, f"{BALANCED} --moe-router-dtype fp64 --moe-router-pre-softmax --moe-router-topk 1", EP, 2),
    "EP2, full and filled up, sent": (2, f"{CAPACITY} --moe-pad-expert-input-to-capacity", f"{EP} {SENT}", 1),
    "EP2, full by position": (2, f"{CAPACITY} --moe-token-drop-policy position", f"{EP} {SENT}", 1),
    "EP2, sinkhorn": (2, SINKHORN, EP, 1),
    "PP2, sinkhorn for one": (2, f"{SINKHORN} --moe-router-topk 1", PP, 2),
    "EP2, balance of micro-batches": (2, f"{BALANCED} --moe-router-load-balancing-type aux_loss", EP, 1),
    "TP2 SP, balance of micro-batches": (2, f"{BALANCED} --moe-router-load-balancing-type aux_loss", SP, 1),
    "TP2 SP, balance of steps": (2, f"{BALANCED} --moe-router-load-balancing-type global_aux_loss", SP, 1),
}


def _train(prefix, extra, world, steps, shape="experts", seed=None, folder=None, save_after=None):
    """Train, saving or resuming; return the parameter count and loss, gradient norm and router losses per step."""
    from mft_megatron.mcore.checkpointing import checkpoint
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer
    from mft_megatron.run_folder.description import CheckpointInfo
    from mft_megatron.run_folder.found import latest_checkpoint

    arguments = arguments_for(prefix, extra if seed is None else f"{extra} --seed {seed}", world, shape)
    dataset = open_dataset(arguments)
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = Trainer(arguments, dataset.vocab_size, 4)
        curve, start = [], 0
        if folder is not None and save_after is None:
            newest = latest_checkpoint(folder)
            path, info = newest.path, newest.info
            checkpoint.load(path, trainer, info, arguments.checkpoint)
            start = info.iteration
        for number, plan in enumerate(plans_of(dataset.split("train"), 1, steps)[start:], start + 1):
            report = trainer.train_step(dataset.split("train"), plan, TASK_WEIGHTS)
            curve.append((report.loss, report.grad_norm, {k: v.tolist() for k, v in report.expert_losses.items()}))
            if number == save_after:
                info = CheckpointInfo(
                    number, 0, {}, dataset.vocab_size, {}, "", 1, 8, layout=process_groups.parallel_layout()
                )
                checkpoint.save(Path(folder), trainer, info, arguments.checkpoint)
        return trainer.num_parameters(), curve


def assert_same(curve, expected, tolerance=1e-6):
    steps = enumerate(zip(curve, expected, strict=True))
    for step, ((loss, norm, losses), (wanted_loss, wanted_norm, wanted)) in steps:
        assert loss == pytest.approx(wanted_loss, rel=tolerance)
        # Adam divides gradients near 0, which are rounding errors, by their size; the z loss is a square of logits
        allowed = tolerance if step == 0 else 5 * tolerance
        assert norm == pytest.approx(wanted_norm, rel=allowed)
        assert losses.keys() == wanted.keys()
        for name, values in losses.items():
            assert values == pytest.approx(wanted[name], rel=allowed, nan_ok=True), name


@functools.cache
def one_process(prefix, options, rows, steps):
    return run_on_ranks(1, _train, prefix, f"{options} --micro-batch-size {rows}", 1, steps)[0]


def compare(prefix, case, steps):
    world, options, layout, rows = case
    parameters, expected = one_process(prefix, options, rows, steps)
    for count, curve in run_on_ranks(world, _train, prefix, f"{options} {layout}", world, steps):
        assert count == parameters
        assert_same(curve, expected)


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(dataset_prefix, case):
    compare(dataset_prefix, CASES[case], 3)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_more_layouts(dataset_prefix, case):
    compare(dataset_prefix, MORE[case], 5)


def test_parameters_are_counted_once(dataset_prefix):
    """4 layers: norms and attention, the router and 4 experts each; embedding, output and last norm."""
    parameters, _ = one_process(dataset_prefix, f"{SIGMOID} {GROUPS}", 2, 3)  # the reference for other parallel layouts
    attention, router, expert = 64 * (64 + 2 * 32) + 64 * 64, 4 * 64, 3 * 64 * 96
    assert parameters == 4 * (2 * 64 + attention + router + 4 * expert) + 2 * 512 * 64 + 64


def _weights(prefix, extra, world, folder):
    """Initial weights, whole, as a checkpoint has them."""
    from mft_megatron.mcore.checkpointing import checkpoint
    from mft_megatron.mcore.checkpointing.tensor_reader import TensorReader
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.trainer import Trainer
    from mft_megatron.run_folder.description import CheckpointInfo

    arguments = arguments_for(prefix, extra, world, "experts")
    with process_groups.process_groups(arguments.distributed, arguments.initialization.seed):
        trainer = Trainer(arguments, 500, 4)
        info = CheckpointInfo(0, 0, {}, 500, {}, "", 0, 8, layout=process_groups.parallel_layout())
        reader = TensorReader(checkpoint.save(Path(folder), trainer, info, arguments.checkpoint))
        names = sorted(reader.names())
        return {name: reader.read(name) for name in names}


@pytest.mark.parametrize("layout", [f"{EP} {SENT}", pytest.param(WHOLE, marks=pytest.mark.slow)])
def test_experts_are_initialised_alike_on_every_layout(dataset_prefix, tmp_path, layout):
    options = f"{SHARED} --moe-layer-freq [0,1,1,1] --init-method-std 0.05"
    (one,) = run_on_ranks(1, _weights, dataset_prefix, options, 1, str(tmp_path / "one"))
    other = run_on_ranks(2, _weights, dataset_prefix, f"{options} {layout}", 2, str(tmp_path / "other"))[0]
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert weight.equal(other[name]), name
    first, second = (one[f"decoder.layers.1.mlp.experts.experts.linear_fc{n}.weight"] for n in (1, 2))
    assert (first.shape, second.shape) == ((4, 192, 64), (4, 64, 96))
    assert len(first.flatten(1)[:, :8].unique(dim=0)) == 4
    assert first.std().item() == pytest.approx(0.05, rel=0.05)
    assert second.std().item() == pytest.approx(0.05 / 8**0.5, rel=0.05)
    assert one["decoder.layers.1.mlp.router.weight"].std().item() == pytest.approx(0.05, rel=0.2)
    assert "decoder.layers.0.mlp.linear_fc1.weight" in one
    assert "decoder.layers.0.mlp.router.weight" not in one
    # the name of a norm in Megatron-Core with Transformer Engine that is fused with no matrix
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in one


RESUMED = {
    "EP2 to TP2 SP": (2, EP, 2, SP),
}
MORE_RESUMED = {
    "EP2 to one": (2, f"{EP} {SENT}", 1, "--micro-batch-size 2"),
    "one to EP2": (1, "", 2, EP),
    "TP2 SP to TP2 ETP1 EP2": (2, SP, 2, f"{WHOLE} --expert-model-parallel-size 2"),
    "EP2 PP2 to EP4": (4, f"{EP} {PP}", 4, EP.replace("2", "4")),
    "EP2 to EP2, distributed optimizer": (2, EP, 2, f"{EP} --use-distributed-optimizer"),
    "distributed optimizer, EP2 to one": (2, f"{EP} --use-distributed-optimizer", 1, ""),
    "PP2 uneven to PP2": (2, f"{PP} --decoder-first-pipeline-num-layers 3", 2, PP),
}


def resume(prefix, folder, case):
    world, layout, other_world, other_layout = case
    options = f"{SIGMOID} --moe-router-bias-update-rate 0.01"
    extra = f"{options} {layout}"
    _, whole = run_on_ranks(world, _train, prefix, extra, world, 3, "experts", None, folder, 2)[0]
    # another seed, so that a weight that is not loaded would differ
    extra = f"{options} {other_layout}"
    for _, rest in run_on_ranks(other_world, _train, prefix, extra, other_world, 3, "experts", 7, folder):
        assert_same(rest, whole[2:])


@pytest.mark.parametrize("case", RESUMED)
def test_a_checkpoint_is_resumed_on_another_layout(dataset_prefix, tmp_path, case):
    resume(dataset_prefix, str(tmp_path), RESUMED[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_RESUMED)
def test_more_checkpoints(dataset_prefix, tmp_path, case):
    resume(dataset_prefix, str(tmp_path), MORE_RESUMED[case])


def _train_as_megatron_fetches(prefix, extra, world):
    """Train after the replacement for machines without CUDA has been undone."""
    from mft_megatron.mcore import trainer as step  # noqa: F401  (readies Megatron-Core for this machine)

    from megatron.core.transformer.moe import moe_utils, token_dispatcher  # isort: skip

    token_dispatcher.maybe_move_tensor_to_cpu = moe_utils.maybe_move_tensor_to_cpu
    try:
        _train(prefix, extra, world, 1)
    except TypeError as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is replaced where there is CUDA")
def test_the_replacement_is_still_needed(dataset_prefix):
    """``tests/mcore/platform/test_without_cuda.py`` tests the others; this one needs two ranks with experts."""
    for reason in run_on_ranks(2, _train_as_megatron_fetches, dataset_prefix, f"{EP} {SENT}", 2):
        assert reason is not None


def _train_padded(prefix, extra, world):
    """Train; return losses, gradient norms, and widths of the micro-batches."""
    from mft_megatron.mcore import trainer as step

    step.WIDTH_MULTIPLE, widths, to_device = 8, [], step.to_device

    def keep(batch):
        widths.append(batch.tokens_BS.shape[1])
        return to_device(batch)

    step.to_device = keep
    return (*_train(prefix, extra, world, 2), widths)


@pytest.mark.slow
def test_padded_rows(tmp_path):
    """Expert-parallel ranks have micro-batches of different widths at the same time."""
    from tests.made_dataset import write_dataset

    prefix = str(tmp_path / "set")
    write_dataset(tmp_path / "set", 128, longest=300, split=(80, 20, 0), padding_mode="padding", overlong="truncate")
    _, expected, _ = run_on_ranks(1, _train_padded, prefix, f"{BALANCED} --micro-batch-size 1", 1)[0]
    ranks = run_on_ranks(2, _train_padded, prefix, f"{BALANCED} {EP} {SENT}", 2)
    assert ranks[0][2] != ranks[1][2]
    for _, curve, _ in ranks:
        assert_same(curve, expected)
