"""Attention by the book: one dense matrix over the whole stream with an explicit mask."""

import torch


def dense_mask(lengths, window=None):
    """bool [T, T]: the same segment, not later, and no more than ``window`` tokens before."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(segment))
    mask = (segment[:, None] == segment[None]) & (place[None] <= place[:, None])
    return mask if window is None else mask & (place[None] >= place[:, None] - window)


def dense_attention(query, key, value, lengths, scale=None, window=None):
    """query [T, heads, d], key and value [T, groups, d] -> [T, heads, d]."""
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~dense_mask(lengths, window).to(query.device), float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)
