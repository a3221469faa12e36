"""Layers of Hugging Face's families on parallel layouts: parallel residual, tanh GELU, scaled rotary frequencies, gates
with GELU, scaled embeddings."""

import pytest

from tests.parallel.run import train
from tests.ranks import run_on_ranks

NEOX = (
    "--position-embedding-type rope --normalization LayerNorm --openai-gelu --parallel-residual --rotary-percent 0.5 "
    '--rope-scaling {"rope_type":"linear","factor":4}'
)
GEMMA = (
    "--position-embedding-type rope --normalization RMSNorm --apply-layernorm-1p --openai-gelu --gated-linear-unit "
    "--scale-embeddings-by-hidden-size --kv-channels 32 --group-query-attention --num-query-groups 2 "
    "--disable-bias-linear"
)
FAMILIES = {"GPT-NeoX": NEOX, "Gemma": GEMMA}
LAYOUTS = (
    "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity selective "
    "--recompute-modules layernorm",
    "--pipeline-model-parallel-size 2 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
)


def _train(prefix, options, world_size):
    return train(prefix, options, world_size, steps=3, shape="Megatron's defaults")[0]


@pytest.fixture(scope="module")
def one_process(dataset_prefix):
    return {name: run_on_ranks(1, _train, dataset_prefix, options, 1)[0] for name, options in FAMILIES.items()}


CASES = [
    ("GPT-NeoX", LAYOUTS[0]),
    ("GPT-NeoX", LAYOUTS[1]),
    pytest.param("Gemma", LAYOUTS[0], marks=pytest.mark.slow),
    ("Gemma", LAYOUTS[1]),
]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_layouts_agree(one_process, dataset_prefix, family, layout):
    for curve in run_on_ranks(2, _train, dataset_prefix, f"{FAMILIES[family]} {layout}", 2):
        for ours, theirs in zip(curve, one_process[family], strict=True):
            assert ours == (pytest.approx(theirs[0], rel=1e-6), pytest.approx(theirs[1], rel=3e-6))


@pytest.mark.parametrize(
    ("family", "option"),
    [
        ("GPT-NeoX", "--parallel-residual"),
        pytest.param("Gemma", "--scale-embeddings-by-hidden-size", marks=pytest.mark.slow),
        pytest.param("Gemma", "--gated-linear-unit", marks=pytest.mark.slow),
    ],
)
def test_each_option_is_another_function(one_process, dataset_prefix, family, option):
    without = run_on_ranks(1, _train, dataset_prefix, FAMILIES[family].replace(option, ""), 1)[0]
    assert without[0] != pytest.approx(one_process[family][0], rel=1e-5)
