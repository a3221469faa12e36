"""Row layouts against weights that are arranged by hand."""

import pytest
import torch

from mft_megatron.arguments.groups.network import NetworkArguments
from mft_megatron.convert.huggingface.families.llama import LLAMA
from mft_megatron.convert.huggingface.row_layouts import (
    Block,
    glu,
    qkv,
    qkv_in_groups,
    rows_of,
    rows_of_sources,
    sizes_of,
    slice_blocks,
    split,
    whole,
)
from mft_megatron.convert.huggingface.safetensors_reader import read_header
from mft_megatron.convert.huggingface.safetensors_writer import PlannedWeight, ShardWriter

SHAPE = NetworkArguments(
    num_layers=2,
    hidden_size=6,
    ffn_hidden_size=5,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=3,
    add_bias_linear=False,
    tie_embeddings=False,
    normalization="RMSNorm",
    swiglu=True,
)
SIZES = sizes_of(SHAPE, 7)


def test_qkv_is_grouped_by_key_value_head():
    names = [f"{part}{d}" for part in ("q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1") for d in range(3)]
    query, key, value = split(torch.arange(24.0)[:, None].expand(24, 6), qkv(SIZES))
    for weight, heads in ((query, ("q0", "q1", "q2", "q3")), (key, ("k0", "k1")), (value, ("v0", "v1"))):
        expected = [names.index(f"{head}{d}") for head in heads for d in range(3)]
        assert weight[:, 0].tolist() == expected
        assert weight.shape == (len(expected), 6)
        assert weight.is_contiguous()


def test_qkv_takes_a_bias():
    query, key, value = split(torch.arange(24.0), qkv(SIZES))
    assert (query.shape, key.shape, value.shape) == ((12,), (6,), (6,))
    assert key.tolist() == [6, 7, 8, 18, 19, 20]


def test_glu_and_whole():
    weight = torch.arange(10.0)[:, None]
    gate, up = split(weight, glu("ffn")(SIZES))
    assert (gate[:, 0].tolist(), up[:, 0].tolist()) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])
    assert whole("vocab")(SIZES) == (Block(0, 0, 7),)
    assert qkv_in_groups(SIZES) == (Block(0, 0, 24),)


@pytest.mark.parametrize("layout", [qkv, glu("ffn"), whole("vocab"), qkv_in_groups])
def test_any_slice_has_the_same_rows_as_the_whole_weight(layout):
    """Rows that are split into the sources and read back by blocks are the original rows."""
    blocks = layout(SIZES)
    weight = torch.arange(float(rows_of(blocks)))
    sources = split(weight, blocks)
    assert [len(source) for source in sources] == rows_of_sources(blocks)
    for first in range(len(weight) + 1):
        for last in range(first, len(weight) + 1):
            rows = [sources[b.source][b.start : b.start + b.rows] for b in slice_blocks(blocks, first, last)]
            assert torch.cat([torch.empty(0), *rows]).equal(weight[first:last])


def test_the_llama_table_covers_a_model():
    names = [name for weight in LLAMA.weights(SHAPE) for name in weight.hf_names]
    assert len(names) == len(set(names)) == 12
    assert not any(".bias" in name or "_norm." in name.replace("model.norm", "") for name in names)
    shapes = {n: s for w in LLAMA.weights(SHAPE) for n, s in zip(w.hf_names, w.hf_shapes(SIZES), strict=True)}
    assert shapes["model.layers.{}.self_attn.k_proj.weight"] == (6, 6)
    assert shapes["model.layers.{}.self_attn.o_proj.weight"] == (6, 12)
    assert shapes["model.layers.{}.mlp.down_proj.weight"] == (6, 5)
    assert shapes["lm_head.weight"] == (7, 6)


def test_shards_end_before_they_are_too_large(tmp_path):
    weights = [PlannedWeight(name, torch.float16, (size,)) for name, size in (("a", 4), ("b", 4), ("c", 20), ("d", 1))]
    writer = ShardWriter(tmp_path, weights, 16)
    for weight in reversed(weights):
        writer.write(weight.name, torch.full(weight.shape, float(ord(weight.name)), dtype=torch.float16))
    writer.finish()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [sorted(read_header(file)) for file in files] == [["a", "b"], ["c"], ["d"]]
    assert [file.name for file in files] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
