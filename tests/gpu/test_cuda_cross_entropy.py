"""Fused output layer and cross entropy on CUDA against fp64 on the CPU."""

import pytest
import torch

TOKENS, HIDDEN, VOCAB, ROWS = 300, 64, 997, 1024
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def both(dtype, known, device="cuda"):
    """Losses and gradients of hidden states and weight: ours on the device, and torch's in fp64."""
    from mft_megatron.losses.objective import Slope
    from mft_megatron.mcore.output_layer.fused_cross_entropy import VocabularyShard, token_losses

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    linear = torch.rand(TOKENS, dtype=torch.float64, generator=generator) / TOKENS
    inputs = [tensor.to(device, copy=True).requires_grad_() for tensor in (hidden, weight)]
    coefficients = linear.to(device)
    losses = token_losses(*inputs, labels.to(device), VocabularyShard(0, VOCAB), Slope(coefficients) if known else None)
    (coefficients * losses.double()).sum().backward()
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1][:VOCAB].T, labels, reduction="none")
    (linear * expected).sum().backward()
    return (losses, *(tensor.grad for tensor in inputs)), (expected, *(tensor.grad for tensor in exact))


@pytest.mark.parametrize("known", [True, False], ids=["slope known", "slope unknown"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_losses_and_gradients(dtype, known, within):
    for ours, theirs in zip(*both(dtype, known), strict=True):
        within(float((ours.cpu().double() - theirs).abs().max() / theirs.abs().max()), TOLERANCE[dtype])
