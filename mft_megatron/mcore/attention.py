"""Attention within each segment of a packed stream, by PyTorch's scaled dot-product attention.

A micro-batch arrives as one stream of tokens cut into segments (``PackedSeqParams``, Megatron's ``thd`` layout). Each
segment attends causally to itself alone: the mask is block-diagonal because other segments are not even passed in. So a
sample's result does not depend on its neighbours, bit for bit, and no work is done on masked blocks. Runs on CPU and on
CUDA; Megatron-Core's own attention without Transformer Engine knows no packing, and on CUDA its fused softmax would
ignore an explicit mask.
"""

import contextlib

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mft_megatron.batch import Batch


def packing(batch: Batch) -> PackedSeqParams:
    """Megatron's description of the segments of a micro-batch."""
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )
    # Lengths on the host, once per micro-batch: otherwise each layer would wait for the device to learn them.
    params.segment_lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
    return params


class PackedAttention(torch.nn.Module):
    """Core attention over ``thd`` tensors: query [T, heads, d], key and value [T, groups, d] -> [T, heads · d]."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
    ):
        super().__init__()
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise ValueError(f"only causal self-attention, not {attn_mask_type} {attention_type} attention")
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        repeat = query.shape[1] // key.shape[1]
        # [T, heads, d] -> one [1, heads, t, d] per segment
        lengths = packed_seq_params.segment_lengths
        segments = [
            tensor.repeat_interleave(times, dim=1).transpose(0, 1).split(lengths, dim=1)
            for tensor, times in ((query, 1), (key, repeat), (value, repeat))
        ]
        dropout = self.dropout if self.training else 0.0
        # Heads are split over tensor-parallel ranks, so each draws dropout of its own.
        with tensor_parallel.get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext():
            outputs = [
                F.scaled_dot_product_attention(
                    q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), is_causal=True, dropout_p=dropout, scale=self.scale
                )
                for q, k, v in zip(*segments, strict=True)
            ]
        return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1).flatten(1)
