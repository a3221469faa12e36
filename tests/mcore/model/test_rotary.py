"""Rotary positions by token equal Megatron-Core's loop over segments, bit for bit."""

import functools

import pytest
import torch

from tests.ranks import run_on_ranks

LENGTHS = (7, 1, 16, 8, 40)
DTYPES = (torch.float32, torch.bfloat16)
PART = torch.tensor([3, 4, 5, 20, 21, 60])
KINDS = {
    "whole": {},
    "half": {"rotary_percent": 0.5},
    "interleaved": {"rotary_interleaved": True},
    "half, interleaved": {"rotary_percent": 0.5, "rotary_interleaved": True},
    "interpolated": {"seq_len_interpolation_factor": 3.0},
    "llama 3": {"rope_scaling": True, "rope_scaling_factor": 8.0},
    "base": {"rotary_base": 500000},
}


@functools.cache
def rotated():
    return run_on_ranks(1, _rotated)[0]


def _rotated():
    """Rotate a tensor by kind and dtype: with Megatron's loop, with our rotation, and ours for a part of the stream."""
    from mft_megatron.arguments.groups.distributed import DistributedArguments
    from mft_megatron.mcore.parallel import process_groups

    with process_groups.process_groups(DistributedArguments(), seed=1):
        return {(kind, dtype): _one_kind(KINDS[kind], dtype) for kind in KINDS for dtype in DTYPES}


def _one_kind(options, dtype):
    """Give each result beside the gradient of its input."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mft_megatron.mcore.kernels.rotary import rotate
    from mft_megatron.mcore.model.rotary import RotaryByPosition

    options = {"rotary_percent": 1.0, **options}
    interleaved = options.get("rotary_interleaved", False)
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, rotary_interleaved=interleaved)
    group = parallel_state.get_context_parallel_group()
    generator = torch.Generator().manual_seed(0)
    tensor, gradient = (torch.randn(sum(LENGTHS), 4, 16, generator=generator).to(dtype) for _ in range(2))
    theirs = RotaryEmbedding(16, use_cpu_initialization=True, **options)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    ours = RotaryByPosition(16, use_cpu_initialization=True, **options)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])

    def with_gradient(rotated, part=slice(None)):
        value = tensor[part].clone().requires_grad_()
        result = rotated(value)
        return result.detach(), *torch.autograd.grad(result, value, gradient[part])

    angles = theirs(max(LENGTHS), packed_seq=True)
    return (
        with_gradient(lambda value: apply_rotary_pos_emb(value, angles, config, cu, cp_group=group)),
        with_gradient(lambda value: rotate(value, ours.rotation(positions))),
        with_gradient(lambda value: rotate(value, ours.rotation(positions[PART])), PART),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_megatron(kind, dtype):
    theirs, ours, ours_of_part = rotated()[kind, dtype]
    assert all(map(torch.equal, ours, theirs))
    assert all(map(torch.equal, ours_of_part, (value[PART] for value in theirs)))


def test_the_kinds_differ():
    results = [rotated()[kind, torch.float32][1][0] for kind in KINDS]
    assert not any(one.equal(other) for number, one in enumerate(results) for other in results[:number])
