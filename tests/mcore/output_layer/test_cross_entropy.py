"""Vocab-parallel losses against fp64 log-softmax over the real vocabulary, forward and backward."""

import pytest
import torch

from tests.ranks import run_on_ranks

TOKENS, VOCAB, PADDED = 9, 131, 256


def _losses(tensor_parallel_size):
    """Losses, and the gradient of this rank's shard of the logits."""
    from megatron.core import parallel_state

    from mft_megatron.arguments.groups.distributed import DistributedArguments
    from mft_megatron.mcore.output_layer.cross_entropy import vocab_parallel_nll
    from mft_megatron.mcore.parallel import process_groups

    with process_groups.process_groups(DistributedArguments(tensor_model_parallel_size=tensor_parallel_size), seed=1):
        logits, labels, upstream = make()
        rank, width = parallel_state.get_tensor_model_parallel_rank(), PADDED // tensor_parallel_size
        part = logits[:, rank * width : (rank + 1) * width].float().requires_grad_()
        losses = vocab_parallel_nll(part * 1.0, labels, VOCAB)
        losses.backward(upstream.float())
        return losses.detach(), part.grad


def make():
    """Logits [T, padded V] and a gradient of the losses [T], fp64, and labels [T]."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(TOKENS, PADDED, dtype=torch.float64, generator=generator) * 3
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    labels[0], labels[1] = 0, VOCAB - 1
    return logits, labels, torch.rand(TOKENS, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("tensor_parallel_size", [1, 2, 4])
def test_equals_log_softmax_over_the_real_vocabulary(tensor_parallel_size):
    logits, labels, upstream = make()
    real = logits[:, :VOCAB].clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(real, labels, reduction="none")
    expected.backward(upstream)
    results = run_on_ranks(tensor_parallel_size, _losses, tensor_parallel_size)
    for losses, _ in results:
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=2e-6, atol=1e-6)
    gradient = torch.cat([gradient for _, gradient in results], dim=1).double()
    torch.testing.assert_close(gradient[:, :VOCAB], real.grad, rtol=1e-5, atol=1e-7)
    assert gradient[:, VOCAB:].abs().max() == 0
