"""Loss and gradient norm do not depend on the layout: each is compared with one process, in fp32, for five steps.

Gradients are clipped here; :mod:`.test_layout_matrix` has every loss on these layouts, and the gradients themselves.
"""

import functools

import pytest
from conftest import run_on_ranks
from run import train

LAYOUTS = {
    "micro-batch 1": (1, "--micro-batch-size 1"),
    "micro-batch 4": (1, "--micro-batch-size 4"),
    "TP2": (2, "--tensor-model-parallel-size 2"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "DP2": (2, "--micro-batch-size 1"),
    "TP2 PP2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --micro-batch-size 1"),
}
MORE = {
    "TP2 SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "TP2 DP2": (4, "--tensor-model-parallel-size 2"),
    "PP2 DP2": (4, "--pipeline-model-parallel-size 2 --micro-batch-size 1"),
    "PP4": (4, "--pipeline-model-parallel-size 4 --micro-batch-size 1"),
    "PP2 VPP2": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "TP2 PP2 VPP2": (
        4,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "TP2 PP2 DP2 SP": (
        8,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel --micro-batch-size 1",
    ),
}


# test_layout_matrix compares the fused cross entropy, the default, with this one
MEGATRON = "--cross-entropy-impl megatron"


@functools.cache
def one_process(prefix, extra):
    return run_on_ranks(1, train, prefix, f"{extra} --micro-batch-size 8", 1)[0]


def compare(prefix, world_size, layout, extra, tolerance=1e-6):
    expected, expected_sums = one_process(prefix, extra)
    for curve, sums in run_on_ranks(world_size, train, prefix, f"{extra} {layout}", world_size):
        for step, (ours, theirs) in enumerate(zip(curve, expected, strict=True)):
            assert ours == pytest.approx(theirs, rel=tolerance), f"step {step + 1}: (loss, gradient norm)"
        for name, values in sums.items():
            assert values == pytest.approx(expected_sums[name], rel=tolerance), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_one_process(dataset_prefix, layout):
    compare(dataset_prefix, *LAYOUTS[layout], f"--mft-loss task-token {MEGATRON}")


@pytest.mark.parametrize("layout", MORE)
def test_more_layouts(dataset_prefix, layout):
    compare(dataset_prefix, *MORE[layout], f"--mft-loss task-sample {MEGATRON}")


@pytest.mark.parametrize("layout", ["PP4 VPP2", "PP2 VPP4", "PP2 VPP2"])
def test_interleaved_stages_of_a_deeper_model(dataset_prefix, layout):
    """Chunks of one layer on four ranks, four chunks on a rank, and two layers in a chunk."""
    import run

    pipeline, virtual = (word[-1] for word in layout.split())
    deep = run.SHAPE.replace("--num-layers 4", "--num-layers 8")
    extra = (
        f"--pipeline-model-parallel-size {pipeline} --num-virtual-stages-per-pipeline-rank {virtual} "
        "--micro-batch-size 1"
    )
    world = int(pipeline)
    expected, expected_sums = run_on_ranks(1, _train_with_shape, deep, dataset_prefix, "", 1)[0]
    for curve, sums in run_on_ranks(world, _train_with_shape, deep, dataset_prefix, extra, world):
        for ours, theirs in zip(curve, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
        for name, values in sums.items():
            assert values == pytest.approx(expected_sums[name], rel=1e-6), name


@functools.cache
def tied_in_one_process(prefix):
    import run

    tied = run.SHAPE.replace("--untie-embeddings-and-output-weights ", "")
    return tied, run_on_ranks(1, _train_with_shape, tied, prefix, MEGATRON, 1)[0][0]


@pytest.mark.parametrize("impl", ["megatron", "fused-linear"])
@pytest.mark.parametrize("layout", ["micro-batch 4", "PP2", "PP2 VPP2"])
def test_tied_embeddings_over_pipeline_stages(dataset_prefix, layout, impl):
    """One weight with two users, on one stage or on two: its gradients are added up and its norm is counted once."""
    tied, expected = tied_in_one_process(dataset_prefix)
    world, extra = {**LAYOUTS, **MORE}[layout]
    extra = f"{extra} --cross-entropy-impl {impl}"
    curves = expected, run_on_ranks(world, _train_with_shape, tied, dataset_prefix, extra, world)[0][0]
    assert curves[0] != one_process(dataset_prefix, "--mft-loss task-token")[0]
    for ours, theirs in zip(curves[1], curves[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def _train_with_batched_messages(prefix, extra, world):
    import dataclasses

    from mft_megatron.mcore import model

    ours = model.transformer_config
    model.transformer_config = lambda arguments: dataclasses.replace(
        ours(arguments), batch_p2p_comm=True, overlap_p2p_comm=False
    )
    return train(prefix, extra, world)


def test_interleaved_stages_must_not_batch_their_messages(dataset_prefix):
    """Why the configuration never does so: the steps run without a complaint, and are wrong."""
    expected = one_process(dataset_prefix, "--mft-loss task-sample")[0]
    world, layout = MORE["PP2 VPP2"]
    extra = f"--mft-loss task-sample {layout}"
    wrong = run_on_ranks(world, _train_with_batched_messages, dataset_prefix, extra, world)[0][0]
    assert abs(wrong[-1][0] / expected[-1][0] - 1) > 1e-3


def _train_with_shape(shape, prefix, extra, world):
    import run

    run.SHAPE = shape
    return train(prefix, extra, world)


RUN_SHAPE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --attention-dropout 0 --hidden-dropout 0 --seq-length 128 "
    "--make-vocab-size-divisible-by 128 --train-iters 5 --lr 1e-3 --global-batch-size 8 "
)
OTHER_SHAPES = {
    "Megatron's defaults": "",
    "rope, qkv bias, q/k norm, half rotated": (
        "--position-embedding-type rope --rotary-percent 0.5 --add-qkv-bias --qk-layernorm --normalization RMSNorm "
        "--disable-bias-linear --swiglu --group-query-attention --num-query-groups 2"
    ),
}


@pytest.mark.parametrize("shape", OTHER_SHAPES)
def test_other_shapes_of_the_model(dataset_prefix, shape):
    words = RUN_SHAPE + OTHER_SHAPES[shape]
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel --micro-batch-size 1"
    expected = run_on_ranks(1, _train_with_shape, words, dataset_prefix, "", 1)[0][0]
    for curve, _ in run_on_ranks(4, _train_with_shape, words, dataset_prefix, layout, 4):
        for ours, theirs in zip(curve, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5 if "norm" in shape else 1e-6)
    half = run_on_ranks(1, _train_with_shape, words, dataset_prefix, "--bf16", 1)[0][0]
    assert half[-1][0] == pytest.approx(expected[-1][0], rel=1e-2)


def test_something_happens(dataset_prefix):
    """The comparison would be empty if nothing was learnt; and the gradients are clipped, at 1."""
    for loss in ("task-token", "task-sample"):
        curve, _ = one_process(dataset_prefix, f"--mft-loss {loss}")
        assert curve[-1][0] < curve[0][0] - 0.1
        assert all(norm > 1.05 for _, norm in curve)


def test_bf16_stays_close(dataset_prefix):
    """bf16 rounds; the layouts must agree to what that leaves, and the two cross entropies."""
    words = "--mft-loss task-token --bf16"
    compare(dataset_prefix, 2, "--tensor-model-parallel-size 2", words, tolerance=1e-2)
    compare(dataset_prefix, 1, MEGATRON, words, tolerance=1e-2)


def _scaled(prefix, world, scale, modes):
    """Loss and gradient norm of a step of each mode with gradients times a number, as a grad scaler has them."""
    from megatron.core.optimizer import FP32Optimizer
    from run import train_in_modes

    FP32Optimizer.get_loss_scale = lambda self: scale_tensor(scale)
    curves = train_in_modes(prefix, "--pipeline-model-parallel-size 2", world, modes, dict.fromkeys(modes, 1))
    return {mode: (curve[0]["loss"], curve[0]["grad_norm"]) for mode, curve in curves.items()}


def scale_tensor(scale):
    import torch

    return torch.tensor([scale], dtype=torch.float32)


def test_gradients_are_times_the_loss_scale(dataset_prefix):
    """The fused cross entropy forms gradients before the scaled value exists: it must have the same scale."""
    modes = {mode: f"--mft-loss {mode} --seed 3" for mode in ("task-token", "focal-task", "focal-sample")}
    plain, scaled = (run_on_ranks(2, _scaled, dataset_prefix, 2, scale, modes) for scale in (1.0, 1024.0))
    for ours, theirs in zip(scaled, plain, strict=True):
        for mode in modes:
            assert ours[mode][0] == pytest.approx(theirs[mode][0], rel=1e-7)
            assert ours[mode][1] == pytest.approx(1024 * theirs[mode][1], rel=1e-6)
