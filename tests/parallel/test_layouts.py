"""Parallel layouts in cases outside the layout matrix: batched messages, bf16, and scaled gradients."""

import pytest

from tests.parallel.layouts import BY_NAME
from tests.parallel.run import train
from tests.ranks import run_on_ranks

MEGATRON = "--cross-entropy-impl megatron"
INTERLEAVED = BY_NAME["PP2 VPP2 MB2"]


def _train_with_batched_messages(prefix, extra, world):
    import dataclasses

    from mft_megatron.mcore.model import gpt

    ours = gpt.transformer_config
    gpt.transformer_config = lambda arguments: dataclasses.replace(
        ours(arguments), batch_p2p_comm=True, overlap_p2p_comm=False
    )
    return train(prefix, extra, world)


def test_interleaved_stages_must_not_batch_their_messages(dataset_prefix):
    """With batched messages the steps run without an error and are wrong, so the configuration never batches them."""
    expected = run_on_ranks(1, train, dataset_prefix, "", 1)[0][0]
    wrong = run_on_ranks(2, _train_with_batched_messages, dataset_prefix, INTERLEAVED.options, 2)[0][0]
    assert abs(wrong[-1][0] / expected[-1][0] - 1) > 1e-3


def test_bf16_stays_close(dataset_prefix):
    """Parallel layouts and the two cross entropies agree up to the rounding of bf16."""
    expected = run_on_ranks(1, train, dataset_prefix, "--bf16", 1)[0][0]
    for world, words in ((2, "--tensor-model-parallel-size 2"), (1, MEGATRON)):
        for curve, _ in run_on_ranks(world, train, dataset_prefix, f"--bf16 {words}", world):
            for ours, theirs in zip(curve, expected, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-2)
    exact = run_on_ranks(1, train, dataset_prefix, "", 1)[0][0]
    assert expected[-1][0] == pytest.approx(exact[-1][0], rel=1e-2)
    assert expected[0] != exact[0]


def _scaled(prefix, world, scale, modes):
    """Train a step in each mode with scaled gradients, as with a grad scaler; return loss and gradient norm."""
    from megatron.core.optimizer import FP32Optimizer

    from tests.parallel.run import train_in_modes

    FP32Optimizer.get_loss_scale = lambda self: scale_tensor(scale)
    curves = train_in_modes(prefix, "--pipeline-model-parallel-size 2", world, modes, dict.fromkeys(modes, 1))
    return {mode: (curve[0]["loss"], curve[0]["grad_norm"]) for mode, curve in curves.items()}


def scale_tensor(scale):
    import torch

    return torch.tensor([scale], dtype=torch.float32)


def test_gradients_are_multiplied_by_the_loss_scale(dataset_prefix):
    """The fused cross entropy computes gradients before the scaled loss exists, and must use the same scale."""
    modes = {mode: f"--mft-loss {mode} --seed 3" for mode in ("task-token", "focal-task", "focal-sample")}
    plain, scaled = (run_on_ranks(2, _scaled, dataset_prefix, 2, scale, modes) for scale in (1.0, 1024.0))
    for ours, theirs in zip(scaled, plain, strict=True):
        for mode in modes:
            assert ours[mode][0] == pytest.approx(theirs[mode][0], rel=1e-7)
            assert ours[mode][1] == pytest.approx(1024 * theirs[mode][1], rel=1e-6)
