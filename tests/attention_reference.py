"""Reference attention: one dense matrix over the whole stream with an explicit mask."""

import torch


def dense_mask(lengths, window=None):
    """Whether a query sees a key, bool [T, T]: same segment, not later, no more than ``window`` tokens earlier."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    index = torch.arange(len(segment))
    mask = (segment[:, None] == segment[None]) & (index[None] <= index[:, None])
    return mask if window is None else mask & (index[None] >= index[:, None] - window)


def dense_attention(query, key, value, lengths, scale=None, window=None):
    """Causal attention within segments: query [T, heads, d], key and value [T, groups, d] -> [T, heads, d]."""
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~dense_mask(lengths, window).to(query.device), float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)
