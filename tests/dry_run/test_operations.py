"""Operations of attention against a mask that is counted, and of products against their definition."""

import numpy as np
import pytest
import torch

from mft_megatron.dry_run.operations import operations_of, visible_pairs

aten = torch.ops.aten


def counted(lengths_q, lengths_k, causal, window):
    """Pairs by the definition, one by one."""
    pairs = 0
    for queries, keys in zip(lengths_q, lengths_k, strict=True):
        for query in range(queries):
            position = query + keys - queries
            seen = [key for key in range(keys) if not causal or key <= position]
            pairs += len([key for key in seen if window is None or position - key <= window])
    return pairs


@pytest.mark.parametrize("window", [None, 0, 1, 3, 6, 50])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"), [([5, 1, 9], [5, 1, 9]), ([3, 2], [7, 2]), ([1], [12]), ([0], [0])]
)
def test_pairs(lengths_q, lengths_k, window):
    arrays = np.array(lengths_q, np.int32), np.array(lengths_k, np.int32)
    assert visible_pairs(*arrays, True, window) == counted(lengths_q, lengths_k, True, window)
    if window is None:
        assert visible_pairs(*arrays, False) == counted(lengths_q, lengths_k, False, None)


def meta(*shape):
    return torch.empty(*shape, device="meta")


def test_products_and_attention():
    product = operations_of(aten.mm.default, (meta(3, 5), meta(5, 7)), [meta(3, 7)], lambda tensor: None)
    assert product == 2 * 3 * 5 * 7
    q, k = meta(2, 4, 6, 8), meta(2, 4, 6, 8)
    flash = aten._scaled_dot_product_flash_attention.default
    assert operations_of(flash, (q, k, k, 0.0, True), [q], lambda tensor: None) == 4 * 2 * 4 * 8 * 21
    assert operations_of(aten.add.Tensor, (q, k), [q], lambda tensor: None) == 0
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    assert varlen
    query, bounds = meta(6, 4, 8), torch.tensor([0, 2, 6])
    arguments = (query, query, query, bounds, bounds, 4, 4, True)
    operator = torch.ops.torch_attn._varlen_attn.default
    assert operations_of(operator, arguments, [query], lambda tensor: tensor) == 4 * 4 * 8 * (3 + 10)
    # one segment where its bounds are unknown
    assert operations_of(operator, arguments, [query], lambda tensor: None) == 4 * 4 * 8 * 21
