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
    compare(dataset_prefix, *LAYOUTS[layout], "--mft-loss task-token")


@pytest.mark.parametrize("layout", MORE)
def test_more_layouts(dataset_prefix, layout):
    compare(dataset_prefix, *MORE[layout], "--mft-loss task-sample")


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


@pytest.mark.parametrize("layout", ["PP2", "PP2 VPP2"])
def test_tied_embeddings_over_pipeline_stages(dataset_prefix, layout):
    """One weight on two stages: its gradients are added up and its norm is counted once."""
    import run

    tied = run.SHAPE.replace("--untie-embeddings-and-output-weights ", "")
    curves = [
        run_on_ranks(world, _train_with_shape, tied, dataset_prefix, extra, world)[0][0]
        for world, extra in ((1, ""), {**LAYOUTS, **MORE}[layout])
    ]
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
    """bf16 rounds; the layouts must agree to what that leaves."""
    compare(dataset_prefix, 2, "--tensor-model-parallel-size 2", "--mft-loss task-token --bf16", tolerance=1e-2)
