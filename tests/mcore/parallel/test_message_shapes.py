"""Shapes of messages between pipeline stages: every rank knows what it receives; tests/parallel sends them."""

import mft_megatron.mcore.platform.patched  # noqa: F401  (before Megatron-Core)

import pytest

from mft_megatron.mcore.parallel.message_shapes import _received


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
