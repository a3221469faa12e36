"""Packed attention against a dense block-diagonal mask in fp64, forward and backward; windows and random numbers."""

import numpy as np
import pytest
import torch

from tests.attention_reference import dense_attention
from tests.ranks import run_on_ranks

LENGTHS = (7, 1, 16, 8)


def attend(tensors, lengths, layer_number=1, training=True, rotation=None, **options):
    """Call attention as Megatron does: query [T, heads, d], key and value [T, groups, d] -> [T, heads, d]."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mft_megatron.mcore.attention.packed_attention import PackedAttention, PackedStream
    from mft_megatron.mcore.parallel.attention_spans import Spans
    from mft_megatron.mcore.parallel.context_parallel import ContextParallelShard

    options = {"attention_dropout": 0.0, **options}
    config = TransformerConfig(num_layers=4, hidden_size=32, num_attention_heads=4, **options)
    attention = PackedAttention(config, layer_number, AttnMaskType.causal, "self").train(training)
    shard = ContextParallelShard(Spans.of(np.array(lengths), np.array(lengths)), None)
    stream = PackedStream(shard=shard, rotation=rotation)
    out = attention(*(tensor.unsqueeze(1) for tensor in tensors), None, packed_seq_params=stream)
    assert out.shape == (len(tensors[0]), 1, tensors[0][0].numel())
    return out.view(tensors[0].shape)


def make(dtype, seed=0):
    """Query [T, 4, 8], key and value [T, 2, 8] of the same numbers for each dtype."""
    total = sum(LENGTHS)
    generator = torch.Generator().manual_seed(seed)
    shapes = ((total, 4, 8), (total, 2, 8), (total, 2, 8))
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def _forward_and_backward(options, layer_number, window):
    """Errors of the output and of the gradients of query, key and value, relative to the largest value."""
    ours = [x.requires_grad_() for x in make(torch.float32)]
    theirs = [x.requires_grad_() for x in make(torch.float64)]
    upstream = torch.randn(sum(LENGTHS), 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours_out = attend(ours, LENGTHS, layer_number, **options)
    theirs_out = dense_attention(*theirs, LENGTHS, window=window)
    ours_out.backward(upstream.float())
    theirs_out.backward(upstream)
    pairs = [(ours_out, theirs_out), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
    pairs = [(a.detach().double(), b.detach()) for a, b in pairs]
    return [float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs]


@pytest.mark.parametrize(
    ("options", "layer_number", "window"),
    [
        ({}, 1, None),
        ({"window_size": (3, 0)}, 1, 3),
        ({"window_size": (0, 0)}, 1, 0),
        ({"window_size": (-1, 0)}, 1, None),
        ({"window_size": (3, 0), "window_attn_skip_freq": 2}, 1, 3),
        ({"window_size": (3, 0), "window_attn_skip_freq": 2}, 2, None),
        ({"window_size": (3, 0), "window_attn_skip_freq": [0, 1, 1, 0]}, 1, None),
        ({"window_size": (3, 0), "window_attn_skip_freq": [0, 1, 1, 0]}, 3, 3),
    ],
)
def test_equals_dense_block_diagonal_attention(options, layer_number, window):
    errors = run_on_ranks(1, _forward_and_backward, options, layer_number, window)[0]
    assert max(errors) < 2e-6, errors


def _neighbours_replaced():
    """Whether a segment's output, and that of the segments before it, stay where those around it change."""
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
    """Outputs while training and in evaluation, and the next random numbers."""
    from mft_megatron.arguments.groups.distributed import DistributedArguments
    from mft_megatron.mcore.parallel import process_groups

    with process_groups.process_groups(DistributedArguments(tensor_model_parallel_size=2), seed=1):
        dropped = attend(make(torch.float32), LENGTHS, attention_dropout=0.5)
        after = torch.rand(3)
        return dropped, attend(make(torch.float32), LENGTHS, attention_dropout=0.5, training=False), after


def test_tensor_parallel_ranks_drop_different_weights_and_leave_other_random_numbers_alone():
    """The ranks have different heads; outside of attention they need the same random numbers."""
    (one, one_whole, one_after), (two, two_whole, two_after) = run_on_ranks(2, _with_dropout)
    assert one_whole.equal(two_whole)
    assert not one.equal(one_whole)
    assert not one.equal(two)
    assert one_after.equal(two_after)


def _wrong_use():
    """Build attention with another mask."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mft_megatron.mcore.attention.packed_attention import PackedAttention

    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4)
    with pytest.raises(ValueError, match="only causal self-attention"):
        PackedAttention(config, 1, AttnMaskType.padding, "self")
    return True


def test_only_causal_self_attention():
    assert run_on_ranks(1, _wrong_use) == [True]


def test_queries_and_keys_are_rotated():
    from mft_megatron.mcore.kernels.rotary import Rotation, rotate

    query, key, value = make(torch.float32)
    rotation = Rotation(torch.rand(len(query), 4, generator=torch.Generator().manual_seed(2)), False)
    rotated = attend((rotate(query, rotation), rotate(key, rotation), value), LENGTHS)
    assert attend((query, key, value), LENGTHS, rotation=rotation).equal(rotated)
    assert not torch.allclose(attend((query, key, value), LENGTHS), rotated)


@pytest.mark.parametrize(
    ("on_gpu", "options", "keeps"),
    [(True, {}, False), (True, {"qk_layernorm": True}, True), (False, {}, True)],
)
def test_on_a_gpu_the_linear_layers_output_is_not_kept(monkeypatch, on_gpu, options, keeps):
    """Query, key and value are slices of it; whoever keeps a slice keeps all of it."""
    from mft_megatron.mcore.kernels.rotary import Rotation
    from mft_megatron.mcore.platform import devices

    monkeypatch.setattr(devices, "on_gpu", lambda tensor: on_gpu)
    mixed = torch.randn(sum(LENGTHS), 8, 8, requires_grad=True)
    slices = mixed.split((4, 2, 2), 1)
    rotation = Rotation(torch.rand(sum(LENGTHS), 4), False)
    storages = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: storages.add(tensor.untyped_storage().data_ptr()) or tensor, lambda tensor: tensor
    ):
        attend(slices, LENGTHS, rotation=rotation, **options)
    assert (mixed.untyped_storage().data_ptr() in storages) == keeps
