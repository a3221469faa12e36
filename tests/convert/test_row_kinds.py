"""Row kinds against weights laid out by hand."""

import dataclasses

import pytest
import torch

from mft_megatron.arguments import NetworkArguments
from mft_megatron.convert.families.llama import LLAMA
from mft_megatron.convert.hf_export import parse_size
from mft_megatron.convert.row_kinds import direct, glu, qkv, vocab
from mft_megatron.errors import InputError

SHAPE = NetworkArguments(num_layers=2, hidden_size=6, num_attention_heads=4, num_query_groups=2, kv_channels=3)


def test_qkv_is_grouped_by_key_value_head():
    names = [f"{part}{d}" for part in ("q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1") for d in range(3)]
    weight = torch.arange(24.0)[:, None].expand(24, 6)
    query, key, value = qkv(weight, SHAPE, 0)
    for part, heads in ((query, ("q0", "q1", "q2", "q3")), (key, ("k0", "k1")), (value, ("v0", "v1"))):
        expected = [names.index(f"{head}{d}") for head in heads for d in range(3)]
        assert part[:, 0].tolist() == expected
        assert part.shape == (len(expected), 6)


def test_qkv_takes_a_bias():
    query, key, value = qkv(torch.arange(24.0), SHAPE, 0)
    assert (query.shape, key.shape, value.shape) == ((12,), (6,), (6,))
    assert key.tolist() == [6, 7, 8, 18, 19, 20]


def test_glu_vocab_and_direct():
    weight = torch.arange(10.0)[:, None]
    gate, up = glu(weight, SHAPE, 0)
    assert (gate[:, 0].tolist(), up[:, 0].tolist()) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])
    assert vocab(weight, SHAPE, 7)[0][:, 0].tolist() == list(range(7))
    assert direct(weight, SHAPE, 0)[0] is weight


LLAMA_SHAPE = dataclasses.replace(
    SHAPE, normalization="RMSNorm", swiglu=True, position_embedding_type="rope", add_bias_linear=False
)


def test_llama_takes_its_own_and_refuses_the_rest_by_name():
    assert LLAMA.refuses(LLAMA_SHAPE) is None
    for name, value in (("add_qkv_bias", True), ("normalization", "LayerNorm"), ("rotary_percent", 0.5)):
        objection = LLAMA.refuses(dataclasses.replace(LLAMA_SHAPE, **{name: value}))
        assert name in objection
        assert str(value) in objection


@pytest.mark.parametrize(("text", "size"), [("5GB", 5_000_000_000), ("200 MB", 200_000_000), ("64kb", 64_000)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "GB", "-1GB", "0MB", "1.5GB", "5TB", ""])
def test_sizes_refused(text):
    with pytest.raises(InputError, match="--max-shard-size"):
        parse_size(text)
