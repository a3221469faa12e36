"""Packed attention against a dense block-diagonal mask in fp64, forward and backward."""

import pytest
import torch
from conftest import run_on_ranks

LENGTHS = (7, 1, 16, 8)


def reference(query, key, value, lengths):
    """Dense attention over the whole stream with an explicit block-diagonal causal mask."""
    total = sum(lengths)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (segment[:, None] == segment[None]) & torch.ones(total, total, dtype=bool).tril()
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


def attend(tensors, lengths):
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mft_megatron.batch import Batch
    from mft_megatron.mcore.attention import PackedAttention, packing

    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, attention_dropout=0.0)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    batch = Batch(None, None, None, None, None, None, cu, max(lengths))
    attention = PackedAttention(config, 1, AttnMaskType.causal, "self")
    return attention(*tensors, None, packed_seq_params=packing(batch))


def make(dtype, seed=0):
    total = sum(LENGTHS)
    generator = torch.Generator().manual_seed(seed)
    shapes = ((total, 4, 8), (total, 2, 8), (total, 2, 8))
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def _forward_and_backward():
    ours = [x.requires_grad_() for x in make(torch.float32)]
    theirs = [x.requires_grad_() for x in make(torch.float64)]
    upstream = torch.randn(sum(LENGTHS), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours_out, theirs_out = attend(ours, LENGTHS), reference(*theirs, LENGTHS)
    ours_out.backward(upstream.float())
    theirs_out.backward(upstream)
    pairs = [(ours_out, theirs_out), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
    return [float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs]


def test_equals_dense_block_diagonal_attention():
    errors = run_on_ranks(1, _forward_and_backward)[0]
    assert max(errors) < 2e-6, errors


def _neighbours_replaced():
    tensors, others = make(torch.float32), make(torch.float32, seed=5)
    start, end = LENGTHS[0] + LENGTHS[1], sum(LENGTHS[:3])
    mixed = [torch.cat([b[:start], a[start:end], b[end:]]) for a, b in zip(tensors, others, strict=True)]
    one, two = attend(tensors, LENGTHS), attend(mixed, LENGTHS)
    return torch.equal(one[start:end], two[start:end]), torch.equal(one[:start], two[:start])


def test_neighbours_do_not_matter():
    same, neighbours_same = run_on_ranks(1, _neighbours_replaced)[0]
    assert same
    assert not neighbours_same


def _with_dropout():
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mft_megatron.arguments import DistributedArguments
    from mft_megatron.batch import Batch
    from mft_megatron.mcore import parallel
    from mft_megatron.mcore.attention import PackedAttention, packing

    with parallel.process_groups(DistributedArguments(tensor_model_parallel_size=2), seed=1):
        config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, attention_dropout=0.5)
        batch = Batch(None, None, None, None, None, None, torch.tensor([0, *LENGTHS]).cumsum(0).int(), max(LENGTHS))
        attention = PackedAttention(config, 1, AttnMaskType.causal, "self")
        dropped = attention(*make(torch.float32), None, packed_seq_params=packing(batch))
        around = torch.rand(3)
        return dropped, attention.eval()(*make(torch.float32), None, packed_seq_params=packing(batch)), around


def test_tensor_parallel_ranks_drop_different_weights_and_leave_other_random_numbers_alone():
    """Their heads are different heads; elsewhere the ranks must draw alike."""
    (one, one_whole, one_around), (two, two_whole, two_around) = run_on_ranks(2, _with_dropout)
    assert one_whole.equal(two_whole)
    assert not one.equal(one_whole)
    assert not one.equal(two)
    assert one_around.equal(two_around)


def _wrong_use():
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mft_megatron.mcore.attention import PackedAttention

    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4)
    with pytest.raises(ValueError, match="only causal self-attention"):
        PackedAttention(config, 1, AttnMaskType.padding, "self")
    return True


def test_only_causal_self_attention():
    assert run_on_ranks(1, _wrong_use) == [True]
