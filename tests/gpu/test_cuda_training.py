"""The trainer on CUDA against the trainer on the CPU."""

import pytest

from tests.gpu.device_runs import on, worst
from tests.made_dataset import write_dataset

BACKENDS = ("local", "varlen", "flash", "fused")
MODES = {
    "task-token": "",
    "focal-task": "--mft-loss focal-task",
    "dropout-free megatron cross entropy": "--cross-entropy-impl megatron",
    "layer norm, GELU, biases": "--normalization LayerNorm --add-qkv-bias",
    "window": "--window-size 20,0",
}


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """Rows with one sample each, most of them with padding at their end."""
    prefix = str(tmp_path_factory.mktemp("padded") / "data")
    write_dataset(prefix, 128, longest=300, split=(80, 20, 0), padding_mode="padding", overlong="truncate")
    return prefix


def skip_if_unavailable(backend):
    from mft_megatron.arguments.values.attention import AttentionShape
    from mft_megatron.mcore.attention.backends import unavailable

    reason = unavailable(backend, AttentionShape("bf16", 16))
    if reason is not None:
        pytest.skip(f"{backend} {reason}")


@pytest.mark.parametrize("mode", MODES)
def test_fp32_is_that_of_the_cpu(dataset_prefix, mode):
    there, here = (on(device, "train", dataset_prefix, MODES[mode]) for device in ("cuda", "cpu"))
    assert there["kernel"] == here["kernel"] == "local"
    assert worst(there["curve"], here["curve"]) < 1e-4


def test_padded_rows_are_those_of_the_cpu(padded):
    there, here = (on(device, "train", padded, "") for device in ("cuda", "cpu"))
    assert worst(there["curve"], here["curve"]) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_is_near_fp32(dataset_prefix, backend):
    skip_if_unavailable(backend)
    there = on("cuda", "train", dataset_prefix, f"--bf16 --attention-backend {backend}")
    here = on("cpu", "train", dataset_prefix, "")
    assert there["kernel"] == {"fused": "Fused"}.get(backend, backend)
    assert worst(there["curve"], here["curve"]) < 5e-2
    assert worst([loss for loss, _ in there["curve"]], [loss for loss, _ in here["curve"]]) < 1e-2


def test_a_run_with_dropout_repeats_itself(dataset_prefix):
    options = "--hidden-dropout 0.1 --attention-dropout 0.1"
    one, two = (on("cuda", "train", dataset_prefix, options) for _ in range(2))
    assert worst(one["curve"], two["curve"]) < 1e-5
    assert worst(one["curve"], on("cuda", "train", dataset_prefix, "")["curve"]) > 1e-5


@pytest.mark.parametrize(("saved", "loaded"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
@pytest.mark.parametrize("options", ["", "--use-distributed-optimizer"])
def test_checkpoints_cross_devices(dataset_prefix, tmp_path, saved, loaded, options):
    kept = on(saved, "save", dataset_prefix, options, str(tmp_path))
    third = on(loaded, "load", dataset_prefix, options, kept["path"])["third"]
    assert worst(third, kept["third"]) < (1e-6 if saved == loaded else 1e-4)


def test_memory_does_not_grow(dataset_prefix):
    """After the second step, which is the first with optimizer states, a step takes no more than the one before."""
    allocated = on("cuda", "train", dataset_prefix, "", 6)["allocated"]
    assert max(allocated[2:]) <= allocated[1] * 1.05


def test_logits_are_not_held(dataset_prefix):
    """With a large vocabulary the fused losses need less than the logits of a micro-batch beside everything else."""
    options = "--make-vocab-size-divisible-by 65536 --micro-batch-size 8"
    fused, whole = (
        on("cuda", "train", dataset_prefix, f"{options} --cross-entropy-impl {name}")["allocated"][1]
        for name in ("fused-linear", "megatron")
    )
    assert whole - fused > 8 * 128 * 65536 * 4


def test_nccl_on_one_rank():
    assert on("cuda", "collectives") == {
        "backend": "nccl",
        "sum": [0, 1, 2],
        "any": [True, False],
        "main": [0, 1, 2],
    }
