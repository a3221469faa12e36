"""Sums of gradients in the matrix product, turned on in fp32: the same training as with a product of its own."""

import pytest

from tests.parallel.run import train
from tests.ranks import run_on_ranks

TIED = "--cross-entropy-impl megatron"
CASES = [
    (
        2,
        f"--pipeline-model-parallel-size 2 {TIED} --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
        "tied",
    ),
    (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", "llama"),
    (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel "
        "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1",
        "experts",
    ),
    (1, TIED, "tied"),
    (1, "--peft-type lora", "llama"),
    (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --overlap-grad-reduce", "llama"),
    (2, "--context-parallel-size 2 --recompute-granularity selective", "llama"),
]
QUICK = 3


def _fused(prefix, options, world_size, shape):
    """Train with the fusion; also return how many sums of gradients it made."""
    from mft_megatron.mcore.kernels import mixed_products
    from mft_megatron.mcore.model import config, gpt

    plain, add, sums = config.fusions, mixed_products.add_weight_gradient, []
    config.fusions = lambda arguments: {**plain(arguments), "gradient_accumulation_fusion": True}
    gpt.mixed_products.add_weight_gradient = lambda *tensors: sums.append(add(*tensors))
    return train(prefix, options, world_size, shape=shape, steps=3)[0], len(sums)


@pytest.mark.parametrize(
    ("world_size", "options", "shape"),
    [pytest.param(*case, marks=() if index < QUICK else pytest.mark.slow) for index, case in enumerate(CASES)],
)
def test_training_is_the_same(dataset_prefix, world_size, options, shape):
    plain = [curve for curve, _ in run_on_ranks(world_size, _plain, dataset_prefix, options, world_size, shape)]
    fused = run_on_ranks(world_size, _fused, dataset_prefix, options, world_size, shape)
    for expected, (curve, sums) in zip(plain, fused, strict=True):
        assert curve == [pytest.approx(step, rel=2e-6) for step in expected]
        assert (sums == 0) == ("lora" in options)  # only matrices that are trained have sums


def _plain(prefix, options, world_size, shape):
    return train(prefix, options, world_size, shape=shape, steps=3)
