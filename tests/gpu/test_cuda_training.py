"""The trainer on CUDA against the trainer on the CPU."""

import pytest

from tests.gpu.device_runs import on, worst
from tests.made_dataset import write_dataset

BACKENDS = ("local", "varlen", "flash", "fused")
MODES = {
    "task-token": "",
    "task-token, epoch": "--mft-normalization epoch",
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


@pytest.fixture(scope="module")
def weighted(tmp_path_factory):
    """Samples and turns with weights."""
    prefix = str(tmp_path_factory.mktemp("weighted") / "data")
    write_dataset(prefix, 128, longest=120, split=(80, 20, 0), weighted="samples turns")
    return prefix


def skip_if_unavailable(backend):
    """Skip the test where an attention backend cannot compute it on this machine."""
    from mft_megatron.arguments.values.attention import AttentionShape
    from mft_megatron.mcore.attention.backends import unavailable

    reason = unavailable(backend, AttentionShape("bf16", 16))
    if reason is not None:
        pytest.skip(f"{backend} {reason}")


@pytest.mark.parametrize("mode", MODES)
def test_fp32_equals_the_cpu(dataset_prefix, mode):
    on_gpu, on_cpu = (on(device, "train", dataset_prefix, MODES[mode]) for device in ("cuda", "cpu"))
    assert on_gpu["kernel"] == on_cpu["kernel"] == "local"
    assert worst(on_gpu["curve"], on_cpu["curve"]) < 1e-4


def test_padded_rows_equal_the_cpu(padded):
    on_gpu, on_cpu = (on(device, "train", padded, "") for device in ("cuda", "cpu"))
    assert worst(on_gpu["curve"], on_cpu["curve"]) < 1e-4


@pytest.mark.parametrize("loss", ["task-sample --mft-normalization epoch", "focal-sample"])
def test_weighted_samples_and_turns_equal_the_cpu(weighted, loss):
    on_gpu, on_cpu = (on(device, "train", weighted, f"--mft-loss {loss}") for device in ("cuda", "cpu"))
    assert worst(on_gpu["curve"], on_cpu["curve"]) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_is_near_fp32(dataset_prefix, backend):
    skip_if_unavailable(backend)
    on_gpu = on("cuda", "train", dataset_prefix, f"--bf16 --attention-backend {backend}")
    on_cpu = on("cpu", "train", dataset_prefix, "")
    assert on_gpu["kernel"] == {"fused": "Fused"}.get(backend, backend)
    assert worst(on_gpu["curve"], on_cpu["curve"]) < 5e-2
    assert worst([loss for loss, _ in on_gpu["curve"]], [loss for loss, _ in on_cpu["curve"]]) < 1e-2


def test_a_run_with_dropout_repeats_itself(dataset_prefix):
    options = "--hidden-dropout 0.1 --attention-dropout 0.1"
    one, two = (on("cuda", "train", dataset_prefix, options) for _ in range(2))
    assert worst(one["curve"], two["curve"]) < 1e-5
    assert worst(one["curve"], on("cuda", "train", dataset_prefix, "")["curve"]) > 1e-5


@pytest.mark.parametrize(("saved", "loaded"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
@pytest.mark.parametrize("options", ["", "--use-distributed-optimizer"])
def test_checkpoints_cross_devices(dataset_prefix, tmp_path, saved, loaded, options):
    checkpoint = on(saved, "save", dataset_prefix, options, str(tmp_path))
    third = on(loaded, "load", dataset_prefix, options, checkpoint["path"])["third"]
    assert worst(third, checkpoint["third"]) < (1e-6 if saved == loaded else 1e-4)


def test_memory_does_not_grow(dataset_prefix):
    """The second step is the first with optimizer states; later steps need no more memory."""
    allocated = on("cuda", "train", dataset_prefix, "", 6)["allocated"]
    assert max(allocated[2:]) <= allocated[1] * 1.05


def test_logits_are_not_held(dataset_prefix):
    """With a large vocabulary the fused losses save more memory than the logits of a micro-batch take."""
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
