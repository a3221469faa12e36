"""Optimizers on CUDA: each against the CPU or plain Adam, and resumed from every other's checkpoint."""

import functools

import pytest

from tests.gpu.device_runs import curves, on, worst

SHARDED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 30001"
AWARE = f"{SHARDED} --use-precision-aware-optimizer"
OFFLOAD = f"{AWARE} --optimizer-cpu-offload"
OPTIMIZERS = {
    "Adam": "",
    "distributed": SHARDED,
    "precision-aware": AWARE,
    "half offloaded": f"{OFFLOAD} --optimizer-offload-fraction 0.5",
    "offloaded": OFFLOAD,
    "offloaded with overlap": f"{OFFLOAD} --overlap-cpu-optimizer-d2h-h2d",
}


def skip_if_unavailable(*names):
    """Skip the test where an optimizer needs a package that is not installed."""
    from megatron.core.optimizer.distrib_optimizer import USING_TE_OPTIMIZER

    if "precision-aware" in names and not USING_TE_OPTIMIZER:
        pytest.skip("precision-aware needs the fused Adam of Transformer Engine")


@functools.cache
def saved_by(name, prefix, folder):
    """Path of a checkpoint that an optimizer wrote after two steps, and the step that followed."""
    return on("cuda", "save", prefix, f"--bf16 {OPTIMIZERS[name]}", folder)


@pytest.mark.parametrize("options", ["", SHARDED, "--optimizer sgd", "--weight-decay 0.3 --clip-grad 0.05"])
def test_fp32_equals_the_cpu(dataset_prefix, options, within):
    within(worst(*curves(dataset_prefix, options, 4)), 1e-4)


@pytest.mark.parametrize("name", list(OPTIMIZERS)[1:])
def test_bf16_equals_plain_adam(dataset_prefix, name, within):
    skip_if_unavailable(name)
    plain, other = (on("cuda", "train", dataset_prefix, f"--bf16 {OPTIMIZERS[each]}", 4) for each in ("Adam", name))
    within(worst(other["curve"], plain["curve"]), 1e-3)


@pytest.mark.parametrize("reader", OPTIMIZERS)
@pytest.mark.parametrize("writer", OPTIMIZERS)
def test_each_resumes_the_checkpoints_of_the_others(dataset_prefix, tmp_path_factory, writer, reader, within):
    skip_if_unavailable(writer, reader)
    saved = saved_by(writer, dataset_prefix, str(tmp_path_factory.getbasetemp() / writer.replace(" ", "_")))
    resumed = on("cuda", "load", dataset_prefix, f"--bf16 --seed 77 {OPTIMIZERS[reader]}", saved["path"])
    within(worst(resumed["third"], saved["third"]), 1e-9 if writer == reader else 1e-3)


def test_fp16_equals_the_cpu(dataset_prefix, within):
    options = "--fp16 --initial-loss-scale 1024"
    within(worst(*curves(dataset_prefix, options)), 1e-2)


def test_a_background_save_is_that_of_its_step(dataset_prefix, tmp_path, within):
    saved = on("cuda", "save", dataset_prefix, f"--bf16 {SHARDED} --async-save --save {tmp_path}", str(tmp_path))
    resumed = on("cuda", "load", dataset_prefix, f"--bf16 --seed 77 {SHARDED}", saved["path"])
    within(worst(resumed["third"], saved["third"]), 1e-9)
