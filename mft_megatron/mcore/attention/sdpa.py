"""Attention by PyTorch's scaled dot-product attention, slice by slice: any device, any dtype.

Other segment slices are not passed in, so a slice's result does not depend on its neighbours, bit for bit, and no work
is done on masked blocks. Keys and values of grouped queries are not repeated.
"""

from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from mft_megatron.mcore.parallel.attention_spans import Spans

# queries that are computed with one mask, where one is needed: [BLOCK, keys that any of them sees]
BLOCK = 256


class _Options(TypedDict):
    """Arguments of ``scaled_dot_product_attention``."""

    scale: float | None
    dropout_p: float
    enable_gqa: bool


def local(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute causal attention within each segment slice.

    Args:
        query: [queries, heads, d], floating point.
        key: [keys, groups, d]; ``groups`` divides ``heads``.
        value: [keys, groups, d].
        spans: lengths of the slices, in the order of queries and keys.
        scale: factor of the products; ``None`` for ``1 / sqrt(d)``.
        window: tokens to the left of its position that a query sees; ``None`` for all.
        dropout: probability with which a weight is dropped.

    Returns:
        [queries, heads, d], dtype of ``query``.
    """
    options: _Options = {"scale": scale, "dropout_p": dropout, "enable_gqa": query.shape[1] != key.shape[1]}
    # one [1, heads or groups, t, d] per slice
    queries, keys, values = (
        tensor.transpose(0, 1).unsqueeze(0).split(list(lengths), dim=2)
        for tensor, lengths in ((query, spans.lengths_q), (key, spans.lengths_k), (value, spans.lengths_k))
    )
    outputs = [_attend(q, k, v, window, options) for q, k, v in zip(queries, keys, values, strict=True)]
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, window: int | None, options: _Options) -> Tensor:
    """Attention of one slice: query [1, heads, q, d], key and value [1, groups, k, d] with k >= q."""
    length, before = query.shape[2], key.shape[2] - query.shape[2]
    if window is not None and window >= key.shape[2] - 1:
        window = None
    if before == 0 and window is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    outputs = []
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        first, last = 0 if window is None else max(before + start - window, 0), before + end
        mask = _mask(end - start, last - first, window, query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end], key[:, :, first:last], value[:, :, first:last], attn_mask=mask, **options
            )
        )
    return torch.cat(outputs, dim=2)


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Whether a query sees a key, bool [queries, keys]; the last query sees the last key."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if window is None else mask.triu(keys - queries - window)
