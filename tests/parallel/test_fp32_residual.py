"""--fp32-residual-connection: the residual stream is in fp32 in every layer and between stages, all else in 16 bits."""

import pytest

from mft_megatron.mcore.model import residual
from tests.parallel.run import arguments_for, plans_of, train, trainer_and_split
from tests.ranks import run_on_ranks

FP32 = "--bf16 --fp32-residual-connection"
keeps_fp32 = pytest.mark.skipif(
    not residual._keeps_fp32(), reason="this Megatron-Core keeps only the embedding in fp32"
)


def _dtypes(prefix, options):
    """Dtypes of what comes into and out of modules in a step: by kind of module, in words."""
    import numpy as np

    from mft_megatron.mcore.parallel import process_groups

    seen = {"layer": set(), "input": set()}

    def note(kind, value):
        seen[kind].add(str(value.dtype))

    arguments = arguments_for(prefix, options, 1)
    with process_groups.process_groups(arguments.distributed, 1):
        trainer, split = trainer_and_split(prefix, options, 1)
        model = trainer.chunks[0].module
        for layer in model.decoder.layers:
            layer.register_forward_hook(lambda module, args, result: note("layer", result[0]))
        for module in model.modules():
            if type(module).__name__.endswith(("Linear", "OutputLayer")):
                module.register_forward_pre_hook(lambda module, args: note("input", args[0]))
        trainer.train_step(split, plans_of(split, 1)[0], np.ones(4))
        return seen


@keeps_fp32
@pytest.mark.parametrize(
    "more",
    [
        "",
        "--normalization LayerNorm",
        "--apply-layernorm-1p",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "--num-experts 4 --moe-router-topk 2",
    ],
)
def test_layers_pass_on_fp32_and_compute_in_16_bits(dataset_prefix, more):
    (seen,) = run_on_ranks(1, _dtypes, dataset_prefix, f"{FP32} {more}")
    assert seen == {"layer": {"torch.float32"}, "input": {"torch.bfloat16"}}
    (without,) = run_on_ranks(1, _dtypes, dataset_prefix, f"--bf16 {more}")
    assert without == {"layer": {"torch.bfloat16"}, "input": {"torch.bfloat16"}}


@keeps_fp32
@pytest.mark.parametrize(
    ("world", "layout"),
    [(2, "--pipeline-model-parallel-size 2"), (2, "--tensor-model-parallel-size 2 --sequence-parallel")],
)
def test_parallel_layouts_agree(dataset_prefix, world, layout):
    one = run_on_ranks(1, train, dataset_prefix, FP32, 1)[0][0]
    several = run_on_ranks(world, train, dataset_prefix, f"{FP32} {layout}", world)[0][0]
    assert [loss for loss, _ in several] == pytest.approx([loss for loss, _ in one], rel=3e-5)
    assert [norm for _, norm in several] == pytest.approx([norm for _, norm in one], rel=6e-3)
    assert one != run_on_ranks(1, train, dataset_prefix, "--bf16", 1)[0][0]


@pytest.mark.skipif(residual._keeps_fp32(), reason="this Megatron-Core keeps the residual stream in fp32")
def test_refused_where_megatron_does_not(dataset_prefix):
    with pytest.raises(
        pytest.fail.Exception, match="InputError: --fp32-residual-connection: the installed Megatron-Core"
    ):
        run_on_ranks(1, train, dataset_prefix, FP32, 1)
