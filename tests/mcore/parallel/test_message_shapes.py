"""Shapes of messages between pipeline stages: every rank knows what it receives; tests/parallel sends them."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import types

import pytest
from megatron.core import parallel_state

from mft_megatron.mcore.parallel.message_shapes import _received, message_shapes


@pytest.mark.parametrize(
    ("stage", "inputs", "gradients"), [(0, [], [0, 1, 2]), (1, [0, 1, 2], [0, 1, 2]), (2, [0, 1, 2], [])]
)
def test_stages_receive_in_the_order_of_micro_batches(stage, inputs, gradients):
    assert _received(3, stage, 3, None, None) == (inputs, gradients)


@pytest.mark.parametrize(
    ("stage", "inputs", "gradients"),
    [
        (0, [0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 2, 3]),
        (1, [0, 1, 0, 1, 2, 3, 2, 3], [0, 1, 2, 3]),
    ],
)
def test_interleaved_stages_receive_in_groups(stage, inputs, gradients):
    """The first chunk of the first stage receives no input, the last one of the last stage no gradient."""
    assert _received(4, stage, 2, 2, 2) == (inputs, gradients)


@pytest.mark.parametrize(("sequence_parallel", "tokens"), [(False, [8, 16]), (True, [2, 4])])
def test_a_message_has_the_tokens_of_one_rank(monkeypatch, sequence_parallel, tokens):
    """Context-parallel ranks cut the stream, and with sequence parallelism tensor-parallel ranks cut their part."""
    sizes = {"tensor_model_parallel": 4, "pipeline_model_parallel": 2, "context_parallel": 2}
    for name, size in sizes.items():
        monkeypatch.setattr(parallel_state, f"get_{name}_world_size", lambda size=size: size)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: 1)
    config = types.SimpleNamespace(
        sequence_parallel=sequence_parallel, virtual_pipeline_model_parallel_size=None, hidden_size=6
    )
    shapes = message_shapes(config, [16, 32])
    assert list(shapes.inputs) == [(length, 1, 6) for length in tokens]
    assert list(shapes.gradients) == []
