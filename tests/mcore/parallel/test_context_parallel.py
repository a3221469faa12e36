"""The shard of a micro-batch that a context-parallel rank has, and attention that several ranks compute."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from mft_megatron.mcore.parallel.context_parallel import ContextParallelShard
from tests.attention_reference import dense_attention
from tests.batches import one_segment
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")


def batch_of(lengths, mask=None, rows=1):
    """A micro-batch of segments of these lengths; all tokens are supervised unless a mask says otherwise."""
    total = sum(lengths)
    batch = one_segment(np.arange(total))
    mask = np.ones(total, np.uint8) if mask is None else mask
    cu_seqlens = np.array([0, *lengths], np.int32).cumsum(dtype=np.int32)
    shaped = {"loss_mask_BS": mask.reshape(rows, -1), "tokens_BS": batch.tokens_BS.reshape(rows, -1)}
    return dataclasses.replace(batch, cu_seqlens=cu_seqlens, max_seqlen=max(lengths), **shaped)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_token_belongs_to_one_rank(size):
    mask = (np.arange(24) % 5 == 0).astype(np.uint8)
    batch = batch_of((7, 1, 16), mask, rows=2)
    tokens_BS = torch.from_numpy(batch.tokens_BS)
    shards = [ContextParallelShard.of(batch, rank, size, CPU) for rank in range(size)]
    parts = [shard.take(tokens_BS) for shard in shards]
    assert all(len(part) == 24 // size for part in parts)
    assert sorted(torch.cat(parts).tolist()) == list(range(24))
    scattered = torch.stack([shard.scatter(part + 1.0, 24) for shard, part in zip(shards, parts, strict=True)])
    assert scattered.sum(0).tolist() == (tokens_BS.flatten() + 1.0).tolist()
    assert (scattered != 0).sum(0).tolist() == [1] * 24
    supervised = [shard.supervised_indices().tolist() for shard in shards]
    assert sorted(itertools.chain(*supervised)) == np.flatnonzero(mask).tolist()
    for shard, part, indices in zip(shards, parts, supervised, strict=True):
        assert part[shard.supervised_N].tolist() == indices
        mask_BS = shard.token_mask(tokens_BS.shape)
        assert (mask_BS is None) == (size == 1)
        if mask_BS is not None:
            assert tokens_BS[mask_BS].tolist() == part.tolist()


def test_the_gradient_of_scattered_values_goes_back_to_them():
    shard = ContextParallelShard.of(batch_of((8,)), 0, 2, CPU)
    part = torch.ones(4, requires_grad=True)
    (shard.scatter(part, 8) * torch.arange(8.0)).sum().backward()
    assert part.grad.tolist() == [0, 1, 6, 7]


def _attend(lengths, size, window, dtype):
    """Indices of this rank's tokens, their attention output, and gradients of their queries, keys and values."""
    from megatron.core import parallel_state
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mft_megatron.arguments.groups.distributed import DistributedArguments
    from mft_megatron.mcore.attention.packed_attention import PackedAttention, PackedStream
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.parallel.context_parallel import shard_of

    with process_groups.process_groups(DistributedArguments(context_parallel_size=size), seed=1):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=32,
            num_attention_heads=4,
            attention_dropout=0.0,
            window_size=None if window is None else (window, 0),
        )
        shard = shard_of(batch_of(lengths), CPU)
        *tensors, upstream = (shard_rows(shard, tensor.to(dtype)) for tensor in make(lengths))
        for tensor in tensors:
            tensor.requires_grad_()
        attention = PackedAttention(config, 1, AttnMaskType.causal, "self")
        packed = PackedStream(shard=shard)
        output = attention(*(tensor.unsqueeze(1) for tensor in tensors), None, packed_seq_params=packed)
        output.backward(upstream.flatten(1).unsqueeze(1))
        assert parallel_state.get_context_parallel_world_size() == size
        return shard.index_T, output.detach().view(upstream.shape), [tensor.grad for tensor in tensors]


def shard_rows(shard, tensor):
    return tensor.index_select(0, shard.index_T)


def make(lengths):
    """Query [T, 4, 8], key and value [T, 2, 8], and a gradient of the output [T, 4, 8], fp64."""
    total, generator = sum(lengths), torch.Generator().manual_seed(0)
    shapes = ((total, 4, 8), (total, 2, 8), (total, 2, 8), (total, 4, 8))
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


@pytest.mark.parametrize(
    ("size", "lengths", "window"),
    [
        (2, (13, 1, 22, 12), None),
        (2, (48,), None),
        (4, (5, 40, 3), None),  # one segment in all blocks but one
        (2, (13, 1, 22, 12), 4),
        (3, (1,) * 12, None),
    ],
)
def test_several_ranks_equal_one(size, lengths, window):
    """Output and the gradients of queries, keys and values; fp64, so that nothing but the order of sums differs."""
    *tensors, upstream = make(lengths)
    for tensor in tensors:
        tensor.requires_grad_()
    expected = dense_attention(*tensors, lengths, window=window)
    expected.backward(upstream)
    seen = []
    for index_T, output, gradients in run_on_ranks(size, _attend, lengths, size, window, torch.float64):
        torch.testing.assert_close(output, expected[index_T].detach(), rtol=0, atol=1e-12)
        for ours, theirs in zip(gradients, tensors, strict=True):
            torch.testing.assert_close(ours, theirs.grad[index_T], rtol=0, atol=1e-12)
        seen += index_T.tolist()
    assert sorted(seen) == list(range(sum(lengths)))


def _sum(size):
    from mft_megatron.arguments.groups.distributed import DistributedArguments
    from mft_megatron.mcore.parallel import process_groups
    from mft_megatron.mcore.parallel.context_parallel import shard_of

    with process_groups.process_groups(DistributedArguments(context_parallel_size=size), seed=1):
        rank = torch.distributed.get_rank()
        value = torch.tensor([1.0 + rank, 10.0], requires_grad=True)
        total = shard_of(batch_of((8,)), CPU).sum(value)
        # each rank's part of the objective is (rank + 1) · total²
        ((rank + 1) * total**2).sum().backward()
        return total.tolist(), value.grad.tolist(), value.tolist()


def test_a_sum_over_ranks_is_differentiated():
    """d/dx Σ_r (r+1)·total² = 2·total·Σ(r+1), the same on every rank."""
    for rank, (total, gradient, value) in enumerate(run_on_ranks(2, _sum, 2)):
        assert total == [3.0, 20.0]
        assert gradient == [2 * 3.0 * 3, 2 * 20.0 * 3]
        assert value == [1.0 + rank, 10.0]  # it is not summed in place
