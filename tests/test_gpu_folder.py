"""``tests/gpu`` on a machine without a GPU: every test is skipped, for that reason only.

Their comparisons run here on the CPU, also with a fault that they must find.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

GPU = Path(__file__).parent / "gpu"


def test_all_are_collected_and_skipped_for_lack_of_a_gpu():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-W", "error", GPU]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=GPU.parent.parent)
    assert process.returncode == 0, process.stdout + process.stderr
    reasons = [line for line in process.stdout.splitlines() if line.startswith("SKIPPED")]
    assert reasons
    assert all(line.endswith(": needs a CUDA device") for line in reasons), reasons
    skipped = sum(int(line.split("[")[1].split("]")[0]) for line in reasons)
    assert process.stdout.splitlines()[-1].startswith(f"{skipped} skipped in"), process.stdout
    assert skipped > 100


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", ["grouped", "one group"])
@pytest.mark.parametrize("case", ["segments", "fewer queries than keys"])
def test_comparisons_of_attention_find_a_fault(case, heads, window):
    from mft_megatron.mcore.attention.sdpa import local
    from tests.gpu.test_cuda_attention import HEADS, SLICES, TOLERANCE, errors

    def with_a_larger_window(query, key, value, spans, scale, window, dropout):
        return local(query, key, value, spans, scale, window + 1 if window is not None else 1, dropout)

    for dtype in (torch.float32, torch.bfloat16):
        arguments = (SLICES[case], HEADS[heads], 16, dtype, None, window, "cpu")
        assert max(errors(local, *arguments)) < TOLERANCE[dtype]
        assert max(errors(with_a_larger_window, *arguments)) > 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_comparisons_of_token_losses_find_a_fault(dtype, known):
    from tests.gpu.test_cuda_cross_entropy import TOLERANCE, both

    for ours, theirs in zip(*both(dtype, known, "cpu"), strict=True):
        assert (ours.double() - theirs).abs().max() / theirs.abs().max() < TOLERANCE[dtype]
        assert (1.1 * ours.double() - theirs).abs().max() / theirs.abs().max() > TOLERANCE[dtype]


def test_differences_at_any_depth():
    from tests.gpu.device_runs import worst

    assert worst([[1.0, 2.0], [4.0, 8.0]], [[1.0, 2.0], [4.0, 8.0]]) == 0
    assert worst([[1.0, 2.0], [4.0, 9.0]], [[1.0, 2.0], [4.0, 8.0]]) == pytest.approx(1 / 8)
    with pytest.raises(AssertionError):
        worst([1.0], [1.0, 2.0])


@pytest.mark.slow
def test_runs_of_other_processes(dataset_prefix, tmp_path):
    from tests.gpu.device_runs import on, worst

    run = on("cpu", "train", dataset_prefix, "")
    assert (run["kernel"], run["allocated"]) == ("local", [0, 0])
    assert worst(run["curve"], on("cpu", "train", dataset_prefix, "--cross-entropy-impl megatron")["curve"]) < 1e-5
    assert worst(run["curve"], on("cpu", "train", dataset_prefix, "--window-size 20,0")["curve"]) > 1e-4
    kept = on("cpu", "save", dataset_prefix, "", str(tmp_path))
    assert on("cpu", "load", dataset_prefix, "", kept["path"])["third"] == kept["third"]
    assert on("cpu", "collectives")["backend"] == "gloo"


def test_comparisons_of_kernels_find_a_fault(monkeypatch):
    from mft_megatron.mcore.kernels import rms_norm, rotary
    from tests.gpu import test_cuda_kernels as kernels

    norm, rotation = next(name for name in kernels.NORMS if "RMSNorm" in name), next(iter(kernels.ROTATIONS))
    assert max(kernels.error_of_norm(name, "cpu") for name in kernels.NORMS) < 6
    assert max(kernels.error_of_rotation(name, "cpu") for name in kernels.ROTATIONS) < 3
    monkeypatch.setattr(rms_norm, "widened", lambda value: value.bfloat16().float())
    assert kernels.error_of_norm(norm, "cpu") > 100
    monkeypatch.setattr(rotary, "rotate", lambda value, rotation: 1.001 * value)
    assert kernels.error_of_rotation(rotation, "cpu") > 100
