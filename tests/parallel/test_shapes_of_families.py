"""Layers that families of Hugging Face need, trained on layouts: the parallel residual, tanh GELU, scaled rotation."""

import pytest
from ranks import run_on_ranks
from run import train

NEOX = (
    "--position-embedding-type rope --normalization LayerNorm --openai-gelu --parallel-residual --rotary-percent 0.5 "
    '--rope-scaling {"rope_type":"linear","factor":4}'
)
LAYOUTS = (
    "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity selective "
    "--recompute-modules layernorm",
    "--pipeline-model-parallel-size 2 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
)


def _train(prefix, options, world_size):
    return train(prefix, options, world_size, steps=3, shape="Megatron's defaults")[0]


@pytest.fixture(scope="module")
def alone(dataset_prefix):
    return run_on_ranks(1, _train, dataset_prefix, NEOX, 1)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(alone, dataset_prefix, layout):
    for curve in run_on_ranks(2, _train, dataset_prefix, f"{NEOX} {layout}", 2):
        for ours, theirs in zip(curve, alone, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)


def test_the_residual_is_another_function(alone, dataset_prefix):
    in_turn = run_on_ranks(1, _train, dataset_prefix, NEOX.replace("--parallel-residual ", ""), 1)[0]
    assert in_turn[0][0] != pytest.approx(alone[0][0], rel=1e-5)
