"""Attention by PyTorch's scaled dot-product attention, piece by piece: everywhere, in any dtype.

Other pieces are not even passed in, so a piece's result does not depend on its neighbours, bit for bit, and no work is
done on masked blocks. Keys and values of grouped queries are not repeated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mft_megatron.mcore.parallel.attention_spans import Spans

# queries that share a mask, where one is needed: it is [BLOCK, keys that any of them sees]
BLOCK = 256


def local(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention within each piece.

    Args:
        query: [queries, heads, d], floating point.
        key, value: [keys, groups, d]; ``groups`` divides ``heads``.
        spans: the pieces, in the order of queries and keys.
        scale: of the products; ``None`` for ``1 / sqrt(d)``.
        window: how many tokens to its left a token sees besides itself; ``None`` for all.
        dropout: probability with which a weight is dropped.

    Returns:
        [queries, heads, d], like ``query``.
    """
    options = {"scale": scale, "dropout_p": dropout, "enable_gqa": query.shape[1] != key.shape[1]}
    # one [1, heads or groups, t, d] per piece
    queries, keys, values = (
        tensor.transpose(0, 1).unsqueeze(0).split(lengths, dim=2)
        for tensor, lengths in ((query, spans.lengths_q), (key, spans.lengths_k), (value, spans.lengths_k))
    )
    outputs = [_piece(*piece, window, options) for piece in zip(queries, keys, values, strict=True)]
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1)


def _piece(query: Tensor, key: Tensor, value: Tensor, window: int | None, options: dict) -> Tensor:
    """Of one piece: query [1, heads, q, d], key and value [1, groups, k, d] with k >= q."""
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
        seen = (slice(None), slice(None), slice(first, last))
        outputs.append(
            F.scaled_dot_product_attention(query[:, :, start:end], key[seen], value[seen], attn_mask=mask, **options)
        )
    return torch.cat(outputs, dim=2)


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which of the last keys a query sees; the last query sees the last key."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if window is None else mask.triu(keys - queries - window)
