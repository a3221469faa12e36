"""Norm and clipping of gradients: the bits of Megatron-Core, and one value is read where it reads every norm."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import importlib.util

import pytest
import torch
import torch.distributed as dist
from megatron.core import utils
from megatron.core.optimizer import clip_grads, optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from mft_megatron.mcore.platform import gradient_norm
from tests.ranks import run_on_ranks

SHAPES = [(3, 5), (1,), (7, 11, 2), (64, 33), (2, 2)]


class Reads(TorchDispatchMode):
    """Counts the values that the host reads of tensors; on a GPU it waits for each."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        self.count += operator is torch.ops.aten._local_scalar_dense.default
        return operator(*arguments, **(keywords or {}))


def _gradients(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).mul(10 ** (n - 3)).to(dtype) for n, shape in enumerate(SHAPES)]


def _norm_and_clipping(ours):
    """Norm by Megatron-Core's function, the gradients after clipping, and how many values were read."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if ours:
        gradient_norm.compute_at_once()
    weights = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in _gradients()]
    for weight, gradient in zip(weights, _gradients(), strict=True):
        weight.grad = gradient
    with Reads() as reads:
        norm = clip_grads.get_grad_norm_fp32([weight.grad for weight in weights])
        clip_grads.clip_grad_by_total_norm_fp32(weights, 0.5, norm)
    return norm, [weight.grad for weight in weights], reads.count


without_kernels = pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in ("transformer_engine", "amp_C")), reason="their kernels are used"
)


@without_kernels
def test_megatron_reads_every_norm():
    """Tensors of the meta device have no values to be read."""
    gradients = [gradient.to("meta") for gradient in _gradients()]
    with pytest.raises((RuntimeError, NotImplementedError)):
        utils.local_multi_tensor_l2_norm(0, torch.zeros(1), [gradients], False)
    norm, _ = gradient_norm.norm_of_all(0, torch.zeros(1), [gradients], False)
    assert norm.is_meta
    assert norm.shape == (1,)


@without_kernels
def test_norm_and_clipping_have_the_bits_of_megatron():
    ((norm, clipped, _),) = run_on_ranks(1, _norm_and_clipping, False)
    ((our_norm, our_clipped, reads),) = run_on_ranks(1, _norm_and_clipping, True)
    assert reads == 1
    assert our_norm == norm
    assert all(torch.equal(*pair) for pair in zip(our_clipped, clipped, strict=True))
    assert not torch.equal(clipped[-1], _gradients()[-1])  # it was clipped


def test_the_norm_is_that_in_fp64():
    for dtype in (torch.float32, torch.bfloat16):
        norm, _ = gradient_norm.norm_of_all(0, torch.zeros(1), [_gradients(dtype)], False)
        expected = torch.cat([gradient.double().flatten() for gradient in _gradients(dtype)]).norm()
        assert norm.dtype == torch.float32
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)


def test_results_may_have_another_dtype_than_their_sources():
    sources, results = _gradients(), [torch.empty(shape, dtype=torch.float16) for shape in SHAPES]
    gradient_norm.scale_all(0, torch.zeros(1), [sources, results], 0.1)
    assert all(torch.equal((source * 0.1).half(), result) for source, result in zip(sources, results, strict=True))


def test_kernels_of_other_packages_stay(monkeypatch):
    """With Transformer Engine its kernels compute; in every release the norm is a number, read before the update."""

    def kernel(*arguments):
        raise NotImplementedError

    monkeypatch.setattr(clip_grads, "l2_norm_impl", kernel)
    for module in (clip_grads, optimizer):
        monkeypatch.setattr(module, "multi_tensor_scale_impl", kernel)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_tensor_impl", kernel, raising=False)
    gradient_norm.compute_at_once()
    assert clip_grads.l2_norm_impl is clip_grads.multi_tensor_scale_impl is kernel
    assert optimizer.multi_tensor_scale_impl is kernel
    assert clip_grads.multi_tensor_scale_tensor_impl is None
