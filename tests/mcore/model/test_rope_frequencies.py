"""Rotary frequencies and attention factors equal those of transformers, at sizes of real models."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from mft_megatron.arguments.values.rope_scaling import read_rope_scaling, rope_scaling
from mft_megatron.mcore.model.rope_frequencies import inverse_frequencies, softmax_scale

LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS = [
    {"rope_type": "linear", "factor": 4},
    {**LLAMA3, "original_max_position_embeddings": 8192},
    {
        **LLAMA3,
        "factor": 8.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 16.0,
        "original_max_position_embeddings": 2048,
    },
    YARN,
    {**YARN, "truncate": False},
    {**YARN, "beta_fast": 20.0, "beta_slow": 3, "attention_factor": 0.9},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4},
    {**YARN, "factor": 0.5},
    {**YARN, "original_max_position_embeddings": 8, "beta_fast": 0.05, "beta_slow": 0.05, "truncate": False},
]


def theirs(scaling, size, base):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = SimpleNamespace(
        rope_parameters={"rope_theta": base, **scaling},
        head_dim=size,
        hidden_size=size,
        num_attention_heads=1,
        max_position_embeddings=131072,
        standardize_rope_params=lambda: None,
        per_layer_config={},
    )
    return ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
@pytest.mark.parametrize(("size", "base"), [(128, 500000), (64, 10000)])
def test_frequencies_are_those_of_transformers(scaling, size, base):
    expected, factor = theirs(scaling, size, base)
    ours = read_rope_scaling(scaling)
    frequencies = inverse_frequencies(size, base, ours)
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, expected, rtol=2e-6, atol=0)
    assert not torch.allclose(frequencies, inverse_frequencies(size, base), rtol=1e-3)
    scale = softmax_scale(size, ours)
    assert (scale or 1 / math.sqrt(size)) == pytest.approx(factor**2 / math.sqrt(size))


def test_plain_frequencies_are_megatrons():
    expected = 1.0 / (10000 ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64))
    assert inverse_frequencies(64, 10000).equal(expected)
    assert softmax_scale(64, None) is None


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
def test_the_option_has_one_spelling(scaling):
    text = rope_scaling(json.dumps(scaling))
    assert rope_scaling(text) == text
    assert read_rope_scaling(json.loads(text)) == read_rope_scaling(scaling)


@pytest.mark.parametrize(
    "text",
    [
        "4",
        "{",
        "{}",
        '{"rope_type": "linear"}',
        '{"rope_type": "linear", "factor": true}',
        '{"rope_type": "linear", "factor": 2, "beta_fast": 3}',
        '{"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4, '
        '"original_max_position_embeddings": 8}',
        '{"rope_type": "yarn", "factor": 2}',
        '{"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 8.5}',
        '{"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 8, "truncate": 1}',
    ],
)
def test_what_is_no_scaling_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011 - json's own among them
        rope_scaling(text)
