"""torch's Adam in one kernel is as exact as by default and makes no temporary tensors."""

import copy

import pytest
import torch

from mft_megatron.mcore.optim.optimizer import fuse_updates
from tests.live_bytes import Peak

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
NUMBERS = 3 * 20_000


def adam(fused, weights, kind=torch.optim.AdamW):
    optimizer = kind(weights, **SETTINGS, foreach=True)
    if fused:
        fuse_updates(optimizer)
        for group in optimizer.param_groups:
            group["foreach"] = None
    return optimizer


def stepped(fused, weights, kind=torch.optim.AdamW, steps=5):
    """Weights after some steps on random gradients, and the bytes that a step after the first one needs at its peak."""
    weights = [copy.deepcopy(weight) for weight in weights]
    optimizer = adam(fused, weights, kind)
    generator = torch.Generator().manual_seed(1)
    for number in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)
        with Peak() as mode:
            optimizer.step()
        assert number == 0 or set(optimizer.state[weights[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    return torch.cat([weight.detach() for weight in weights]), mode.peak


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_updates_are_those_of_fp64(kind):
    exact = [torch.nn.Parameter(torch.randn(NUMBERS // 3, dtype=torch.float64)) for _ in range(3)]
    weights = [torch.nn.Parameter(weight.detach().float()) for weight in exact]
    exact = [torch.nn.Parameter(weight.detach().double()) for weight in weights]
    expected, _ = stepped(False, exact, kind)
    errors = {fused: (stepped(fused, weights, kind)[0] - expected).abs().max() for fused in (False, True)}
    assert errors[True] <= max(1.1 * errors[False], 1e-7)


def test_no_temporary_tensors():
    weights = [torch.nn.Parameter(torch.randn(NUMBERS // 3)) for _ in range(3)]
    assert stepped(False, weights)[1] >= 4 * NUMBERS
    assert stepped(True, weights)[1] <= 4096


def test_other_optimizers_stay_as_they_are():
    plain = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], momentum=0.9)
    fuse_updates(plain)
    fuse_updates(None)
    assert not plain.param_groups[0]["fused"]
