"""The trainer on CUDA against the trainer on the CPU."""

import pytest

from mft_megatron.loss_names import LOSSES
from tests.gpu.device_runs import curves, on, on_cpu, worst
from tests.made_dataset import write_dataset

BACKENDS = ("local", "varlen", "flash", "fused")
OBJECTIVES = [
    *(f"--mft-loss {loss}" for loss in LOSSES),
    "--mft-loss task-token --mft-normalization epoch",
    "--mft-loss task-sample --mft-normalization micro-batch",
    "--cross-entropy-impl megatron",
]
LAYERS = {
    "RMSNorm": "--normalization RMSNorm",
    "zero-centred RMSNorm": "--normalization RMSNorm --apply-layernorm-1p",
    "LayerNorm, GELU, biases": "--normalization LayerNorm --add-qkv-bias",
    "zero-centred LayerNorm": "--normalization LayerNorm --apply-layernorm-1p",
    "norms of queries and keys": "--qk-layernorm",
    "window": "--window-size 20,0",
    "half-rotated heads": "--rotary-percent 0.5",
    "recomputed layers": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "recomputed norms": "--recompute-granularity selective --recompute-modules layernorm core_attn mlp",
}
RESIDUAL = "--fp32-residual-connection"


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


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objective_in_fp32_equals_the_cpu(dataset_prefix, objective, within):
    on_gpu, theirs = on("cuda", "train", dataset_prefix, objective), on_cpu("train", dataset_prefix, objective)
    assert on_gpu["kernel"] == theirs["kernel"] == "local"
    within(worst(on_gpu["curve"], theirs["curve"]), 1e-4)


@pytest.mark.parametrize("layers", LAYERS)
def test_layers_in_fp32_equal_the_cpu(dataset_prefix, layers, within):
    on_gpu, theirs = (
        on("cuda", "train", dataset_prefix, LAYERS[layers]),
        on_cpu("train", dataset_prefix, LAYERS[layers]),
    )
    within(worst(on_gpu["curve"], theirs["curve"]), 1e-4)


def test_padded_rows_equal_the_cpu(padded, within):
    within(worst(*curves(padded, "")), 1e-4)


@pytest.mark.parametrize("loss", ["task-sample --mft-normalization epoch", "focal-sample"])
def test_weighted_samples_and_turns_equal_the_cpu(weighted, loss, within):
    on_gpu, theirs = (
        on("cuda", "train", weighted, f"--mft-loss {loss}"),
        on_cpu("train", weighted, f"--mft-loss {loss}"),
    )
    within(worst(on_gpu["curve"], theirs["curve"]), 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_is_near_fp32(dataset_prefix, backend, within):
    skip_if_unavailable(backend)
    on_gpu = on("cuda", "train", dataset_prefix, f"--bf16 --attention-backend {backend}")
    theirs = on_cpu("train", dataset_prefix, "")
    assert on_gpu["kernel"] == {"fused": "Fused"}.get(backend, backend)
    within(worst([loss for loss, _ in on_gpu["curve"]], [loss for loss, _ in theirs["curve"]]), 1e-2)
    within(worst(on_gpu["curve"], theirs["curve"]), 5e-2)


@pytest.mark.parametrize("layers", [*LAYERS, RESIDUAL])
def test_bf16_layers_are_near_those_of_the_cpu(dataset_prefix, layers, within):
    within(worst(*curves(dataset_prefix, f"--bf16 {LAYERS.get(layers, layers)}")), 5e-2)


def test_a_run_with_dropout_repeats_itself(dataset_prefix, within):
    options = "--hidden-dropout 0.1 --attention-dropout 0.1"
    one, two = (on("cuda", "train", dataset_prefix, options) for _ in range(2))
    within(worst(one["curve"], two["curve"]), 1e-5)
    assert worst(one["curve"], on("cuda", "train", dataset_prefix, "")["curve"]) > 1e-5


@pytest.mark.parametrize(("saved", "loaded"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
@pytest.mark.parametrize("options", ["", "--use-distributed-optimizer"])
def test_checkpoints_cross_devices(dataset_prefix, tmp_path, saved, loaded, options, within):
    checkpoint = on(saved, "save", dataset_prefix, options, str(tmp_path))
    third = on(loaded, "load", dataset_prefix, options, checkpoint["path"])["third"]
    within(worst(third, checkpoint["third"]), 1e-6 if saved == loaded else 1e-4)


def test_memory_does_not_grow(dataset_prefix):
    """The second step is the first with optimizer states; later steps need no more memory."""
    allocated = on("cuda", "train", dataset_prefix, "", 6)["allocated"]
    assert max(allocated[2:]) <= allocated[1] * 1.05, allocated


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
