"""Attention packages in plain PyTorch: a reference of what they document, and functions to replace theirs.

The functions have the signatures of the real ones and do what those do with wrong arguments too: queries and keys
beyond ``max_seqlen`` are not computed, a mask is aligned where the package aligns it, dropout is applied whenever it is
passed. So a wrong argument gives wrong numbers, as it would on a GPU.
"""

import sys
import types

import torch


def dense(
    query, key, value, cu_q, cu_k, scale=None, window=(-1, 0), aligned_at_end=True, dropout=0.0, most=(None, None)
):
    """Attention of a whole stream with one dense mask, in the tensors' dtype.

    Args:
        query: [Tq, heads, d].
        key: [Tk, groups, d].
        value: [Tk, groups, d].
        cu_q: int32 [slices + 1], where each slice's queries start, then how many there are.
        cu_k: int32 [slices + 1], the same of keys.
        scale: of the products; ``None`` for ``1 / sqrt(d)``.
        window: (left, right): keys to either side of the one that is aligned with the query; -1 for all.
        aligned_at_end: the last query is aligned with the last key, or the first with the first.
        dropout: probability with which a weight is dropped.
        most: queries and keys of a slice that are computed.

    Returns:
        [Tq, heads, d].
    """
    lengths_q, lengths_k = cu_q.diff(), cu_k.diff()
    slice_q, index_q = _slices_and_indices(lengths_q)
    slice_k, index_k = _slices_and_indices(lengths_k)
    shift = (lengths_k - lengths_q if aligned_at_end else torch.zeros_like(lengths_q))[slice_q]
    distance = (index_q + shift)[:, None] - index_k[None]  # how far a key is to the left
    mask = slice_q[:, None] == slice_k[None]
    left, right = window
    mask &= (distance <= left) if left >= 0 else True
    mask &= (-distance <= right) if right >= 0 else True
    mask &= (index_k < most[1])[None] if most[1] is not None else True
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * torch.einsum("qhd,khd->hqk", query, key)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0)  # no key at all: zeros
    weights = torch.nn.functional.dropout(weights, dropout)
    output = torch.einsum("hqk,khd->qhd", weights, value)
    return output if most[0] is None else output * (index_q < most[0])[:, None, None]


def _slices_and_indices(lengths):
    """For each token, its slice and its index there."""
    slice_of_token = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    starts = lengths.cumsum(0) - lengths
    return slice_of_token, torch.arange(int(lengths.sum())) - starts[slice_of_token]


def _check(query, key, value, cu_q, cu_k):
    """Refuse arguments that each of the packages refuses."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q.shape == cu_k.shape
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert query.shape[0] == cu_q[-1]
    assert key.shape[0] == value.shape[0] == cu_k[-1]


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """The function of ``torch.nn.attention.varlen`` since torch 2.12."""
    _check(query, key, value, cu_seq_q, cu_seq_k)
    if not enable_gqa and query.size(1) != key.size(1):
        raise ValueError("Expect query and key/value to have the same number of heads")
    assert query.shape[2] % 8 == 0
    assert isinstance(window_size, tuple)  # it is causal where this equals (-1, 0), and a list does not
    return dense(query, key, value, cu_seq_q, cu_seq_k, scale, window_size, most=(max_q, max_k))


def varlen_attn_of_2_11(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
):
    """The function of torch 2.11, which has no grouped queries."""
    return varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=False
    )


def varlen_attn_of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    """The function of torch 2.10: causal or not, and nothing else."""
    window = (-1, 0 if is_causal else -1)
    return varlen_attn_of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """The function of flash-attn 2.7.3 to 2.8.3."""
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    window = (window_size[0], 0 if causal else window_size[1])
    most = (max_seqlen_q, max_seqlen_k)
    return dense(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window, dropout=dropout_p, most=most)


class DotProductAttention(torch.nn.Module):
    """The module of Transformer Engine 2.9 to 2.11, for ``thd`` only; ``num_splits`` came with 2.10.

    cuDNN has no dropout with a mask that is aligned at the end, and none with a window.
    """

    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=None,
        sequence_parallel=False,
        tp_size=1,
        get_rng_state_tracker=None,
        tp_group=None,
        layer_number=None,
        attention_type="self",
        cp_group=None,
        cp_global_ranks=None,
        cp_stream=None,
        cp_comm_type="p2p",
        softmax_scale=None,
        softmax_type="vanilla",
        return_max_logit=False,
    ):
        super().__init__()
        self.heads, self.groups, self.size = num_attention_heads // tp_size, num_gqa_groups // tp_size, kv_channels
        self.attention_dropout, self.scale = attention_dropout, softmax_scale

    def forward(
        self,
        query_layer,
        key_layer,
        value_layer,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        cu_seqlens_q_padded=None,
        cu_seqlens_kv_padded=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        attn_mask_type=None,
        window_size=None,
        checkpoint_core_attention=False,
        core_attention_bias_type="no_bias",
        core_attention_bias=None,
        alibi_slopes=None,
        fast_zero_fill=True,
        inference_params=None,
        pad_between_seqs=None,
        fp8_output=False,
        num_splits=1,
    ):
        _check(query_layer, key_layer, value_layer, cu_seqlens_q, cu_seqlens_kv)
        assert query_layer.dtype == key_layer.dtype == value_layer.dtype
        assert num_splits == 1
        assert query_layer.shape[1:] == (self.heads, self.size)
        assert key_layer.shape[1:] == (self.groups, self.size)
        assert qkv_format == "thd"
        assert attn_mask_type in ("padding_causal", "padding_causal_bottom_right")
        assert window_size[1] == 0
        at_end = attn_mask_type.endswith("bottom_right")
        dropout = self.attention_dropout
        if dropout and (at_end or window_size[0] >= 0):
            raise ValueError("No dot product attention backend is available for the provided inputs.")
        output = dense(
            *(query_layer, key_layer, value_layer, cu_seqlens_q, cu_seqlens_kv, self.scale, window_size, at_end),
            dropout=dropout if self.training else 0.0,
            most=(max_seqlen_q, max_seqlen_kv),
        )
        return output.flatten(1)


VERSIONS = {"flash_attn": "2.8.3", "transformer_engine": "2.11.0"}


def install(monkeypatch, versions=None, **replaced):
    """Replace the packages by the functions of this file, on a machine that seems to have an H100.

    Args:
        monkeypatch: of pytest.
        versions: by package, where they differ from :data:`VERSIONS`; ``None`` for a package that is absent.
        replaced: by name, functions in place of those of this file; ``varlen_attn=None`` for a torch without it.
    """
    from mft_megatron.mcore.platform import devices

    versions = {**VERSIONS, **(versions or {})}
    functions = {
        "varlen_attn": varlen_attn,
        "flash_attn_varlen_func": flash_attn_varlen_func,
        "DotProductAttention": DotProductAttention,
        **replaced,
    }
    monkeypatch.setattr(devices, "HAS_CUDA", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    varlen = None if functions["varlen_attn"] is None else types.ModuleType("torch.nn.attention.varlen")
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", varlen)
    if varlen is not None:
        varlen.varlen_attn = functions["varlen_attn"]
    modules = {
        "flash_attn": types.ModuleType("flash_attn"),
        "transformer_engine": types.ModuleType("transformer_engine"),
        "transformer_engine.pytorch": types.ModuleType("transformer_engine.pytorch"),
    }
    modules["flash_attn"].flash_attn_varlen_func = functions["flash_attn_varlen_func"]
    modules["transformer_engine.pytorch"].DotProductAttention = functions["DotProductAttention"]
    modules["transformer_engine"].pytorch = modules["transformer_engine.pytorch"]
    for name, module in modules.items():
        package = name.partition(".")[0]
        module.__version__ = versions[package]
        if versions[package] is not None:
            monkeypatch.setitem(sys.modules, name, module)
