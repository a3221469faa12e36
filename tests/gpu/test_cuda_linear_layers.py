"""Linear layers on CUDA: Transformer Engine's against Megatron-Core's, fp8, and fused sums of weights' gradients."""

import pytest

from mft_megatron.arguments.groups.transformer_engine import FP8_MULTIPLES
from mft_megatron.mcore.platform.optional_packages import TRANSFORMER_ENGINE, missing
from tests.gpu.device_runs import curves, on, worst

ENGINE = "--transformer-impl transformer_engine"


def skip_without_transformer_engine(recipe=None):
    """Skip the test where Transformer Engine is missing, or the GPU has no fp8 of this recipe."""
    import torch

    from mft_megatron.mcore.model.transformer_engine import FP8

    reason = missing(TRANSFORMER_ENGINE)
    if reason is not None:
        pytest.skip(f"Transformer Engine {reason}")
    if recipe is not None and torch.cuda.get_device_capability() < FP8[recipe]:
        pytest.skip(f"{recipe} needs compute capability {'.'.join(map(str, FP8[recipe]))}")


@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm"])
def test_transformer_engine_is_near_the_cpu(dataset_prefix, norm, within):
    skip_without_transformer_engine()
    options = f"--bf16 --normalization {norm}"
    engine = on("cuda", "train", dataset_prefix, f"{options} {ENGINE}")["curve"]
    within(worst(engine, on("cpu", "train", dataset_prefix, options)["curve"]), 5e-2)


@pytest.mark.parametrize("recipe", FP8_MULTIPLES)
def test_fp8_is_near_bf16(dataset_prefix, recipe, within):
    skip_without_transformer_engine(recipe)
    options = f"--bf16 {ENGINE}"
    in_fp8 = on("cuda", "train", dataset_prefix, f"{options} --fp8-format hybrid --fp8-recipe {recipe}")["curve"]
    in_bf16 = on("cuda", "train", dataset_prefix, options)["curve"]
    within(worst([loss for loss, _ in in_fp8], [loss for loss, _ in in_bf16]), 3e-2)
    assert in_fp8 != in_bf16


@pytest.mark.parametrize(("writer", "reader"), [(ENGINE, ""), ("", ENGINE), (ENGINE, ENGINE)])
def test_checkpoints_cross_implementations(dataset_prefix, tmp_path, writer, reader, within):
    skip_without_transformer_engine()
    saved = on("cuda", "save", dataset_prefix, f"--bf16 {writer}", str(tmp_path))
    resumed = on("cuda", "load", dataset_prefix, f"--bf16 --seed 77 {reader}", saved["path"])
    within(worst(resumed["third"], saved["third"]), 1e-9 if writer == reader else 5e-2)


@pytest.mark.parametrize("dtype", ["bf16", "fp16 --initial-loss-scale 1024"])
def test_fused_sums_of_gradients(dataset_prefix, dtype, within):
    """Gradients of several micro-batches, added in fp32 by the products or after rounding; and against the CPU."""
    options = f"--{dtype} --micro-batch-size 1"
    fused, theirs = curves(dataset_prefix, options)
    rounded = on("cuda", "train", dataset_prefix, f"{options} --no-gradient-accumulation-fusion")["curve"]
    within(worst(fused, theirs), 5e-2)
    within(worst(fused, rounded), 2e-2)
